"""Triton form of ``kernels.block_sparse``: pool, mean, scores, choice, attention: five launches.

The attention walks the list of a block of queries: blocks of keys without masks, save the last,
which may hold the end of its sequence.  Where the far is pooled, another loop follows over all
spans, those of listed blocks masked.

Legend: Q queries of a block, K keys of a block, S spans of a tile, d head width.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels._triton import compress
from kernels._triton.attention_fold import fold
from kernels._triton.attention_tiles import LOG2_E, MIN_WIDTH, describe, is_aligned
from kernels._triton.block_sparse_choice import launch_choice
from kernels._triton.numerics import dot
from kernels._triton.tiles import find_tile, row_offsets, store_rows
from kernels.attention_config import tiles
from kernels.block_sparse import SparsePattern


@triton.jit
def _fold_biased(
    q_Qd: tl.tensor,
    k_Kd: tl.tensor,
    v_Kd: tl.tensor,
    bias_K: tl.tensor,
    peak_Q: tl.tensor,
    total_Q: tl.tensor,
    sum_Qd: tl.tensor,
    scale: tl.tensor,
    ALONE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """``fold`` with a bias for each key, in base 2; -inf for one that is not seen."""
    score_QK = dot(q_Qd, k_Kd.T, tl.zeros((q_Qd.shape[0], k_Kd.shape[0]), tl.float32)) * scale
    score_QK += bias_K[None, :]
    if not ALONE:  # a stranger's NaN
        score_QK = tl.where(bias_K[None, :] == -float("inf"), -float("inf"), score_QK)
    new_peak_Q = tl.maximum(peak_Q, tl.max(score_QK, axis=1))
    shift_Q = tl.where(new_peak_Q == -float("inf"), 0.0, new_peak_Q)
    weight_QK = tl.exp2(score_QK - shift_Q[:, None])
    decay_Q = tl.exp2(peak_Q - shift_Q)
    total_Q = total_Q * decay_Q + tl.sum(weight_QK, axis=1)
    sum_Qd = dot(weight_QK.to(v_Kd.dtype), v_Kd, sum_Qd * decay_Q[:, None])
    return new_peak_Q, total_Q, sum_Qd


@triton.jit(do_not_specialize=["num_sequences", "num_halvings", "num_blocks"])
def _listed_kernel(
    q_rows: tl.tensor,
    k_rows: tl.tensor,
    v_rows: tl.tensor,
    pooled_k_rows: tl.tensor,
    pooled_v_rows: tl.tensor,
    out_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    seen_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    num_sequences: tl.tensor,
    num_halvings: tl.tensor,
    num_blocks: tl.tensor,
    stride_h: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    MOST: tl.constexpr,
    POOL: tl.constexpr,
    WITH_FAR: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    slot = tl.program_id(0)
    head = tl.program_id(1)
    sequence, start, end, tile = find_tile(slot, cu_ptr, num_sequences, num_halvings, BLOCK_Q)
    first = start + tile * BLOCK_Q
    if first < end:
        column = head * stride_h
        line = (head * tl.num_programs(0) + slot).to(tl.int64)
        q_Qd = q_rows.load([first, column])
        peak_Q = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
        total_Q = tl.zeros((BLOCK_Q,), tl.float32)
        sum_Qd = tl.zeros((BLOCK_Q, D), tl.float32)
        list_ptr = blocks_ptr + line * MOST
        count = tl.load(counts_ptr + line)
        block = tl.load(list_ptr)
        for turn in range(1, count):
            following = tl.load(list_ptr + turn)  # a step early: its latency is hidden
            row = start + block * BLOCK_K
            k_Kd = k_rows.load([row, column])
            v_Kd = v_rows.load([row, column])
            peak_Q, total_Q, sum_Qd = fold(
                q_Qd, k_Kd, v_Kd, True, peak_Q, total_Q, sum_Qd, scale, False
            )
            block = following
        for _ in range(tl.minimum(count, 1)):  # once; outside a loop products wait for each other
            row = start + block * BLOCK_K
            k_Kd = k_rows.load([row, column])
            v_Kd = v_rows.load([row, column])
            inside_K = row + tl.arange(0, BLOCK_K) < end
            if not ALONE:  # what is not finite in a stranger's row would turn 0 * x into NaN
                v_Kd = tl.where(inside_K[:, None], v_Kd, 0.0)
            bias_K = tl.where(inside_K, 0.0, -float("inf"))
            peak_Q, total_Q, sum_Qd = _fold_biased(
                q_Qd, k_Kd, v_Kd, bias_K, peak_Q, total_Q, sum_Qd, scale, ALONE
            )
        if WITH_FAR:
            n = end - start
            for span in tl.range(0, tl.cdiv(n, POOL), BLOCK_S, disable_licm=True):
                row = start // POOL + sequence + span
                k_Sd = pooled_k_rows.load([row, head * D])
                v_Sd = pooled_v_rows.load([row, head * D])
                span_S = span + tl.arange(0, BLOCK_S)
                held_S = tl.minimum(n - span_S * POOL, POOL)
                block_S = span_S * POOL // BLOCK_K
                is_near_S = tl.load(
                    seen_ptr + line * num_blocks + block_S, mask=held_S > 0, other=1
                )
                if not ALONE:
                    v_Sd = tl.where((held_S > 0)[:, None], v_Sd, 0.0)
                weight_S = tl.maximum(held_S, 1).to(tl.float32)
                bias_S = tl.where(is_near_S > 0, -float("inf"), tl.log2(weight_S))
                peak_Q, total_Q, sum_Qd = _fold_biased(
                    q_Qd, k_Sd, v_Sd, bias_S, peak_Q, total_Q, sum_Qd, scale, ALONE
                )
        out_base = out_ptr + (first.to(tl.int64) * H + head) * D
        out_Qd = sum_Qd / total_Q[:, None]
        store_rows(out_base, row_offsets(H * D, BLOCK_Q, D), out_Qd, end - first)


def launch(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    cu_seqlens: Tensor,
    pattern: SparsePattern,
) -> Tensor:
    """Run the kernels on checked inputs.

    Raises:
        ValueError: A block or span of the pattern is not a power of two.
    """
    sizes = (pattern.query_block, pattern.key_block, pattern.pool)
    if any(size & (size - 1) for size in sizes):
        message = f"impl='triton': expected blocks of powers of two, got {sizes}"
        raise ValueError(message)
    num_rows, num_heads, width = q_THd.shape
    if q_THd.numel() == 0:
        return torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
    q, k, v = _aligned(q_THd, k_THd, v_THd)
    padded, num_sequences = q.shape[2], cu_seqlens.numel() - 1
    with_far = pattern.far == "pooled"
    config = tiles()["pooled" if with_far else "sparse"]
    if num_sequences > 1:  # values of strangers are cut out in registers: a bound would spill them
        config = config._replace(max_registers=0)
    pooled_k = compress.launch(k, cu_seqlens, pattern.pool)
    pooled_v = compress.launch(v, cu_seqlens, pattern.pool) if with_far else pooled_k
    choice = launch_choice(q, pooled_k, cu_seqlens, pattern)
    out_THd = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_slots = num_rows // pattern.query_block + num_sequences
    _listed_kernel[(num_slots, num_heads)](
        describe(q, pattern.query_block),
        describe(k, pattern.key_block),
        describe(v, pattern.key_block),
        describe(pooled_k, config.block_k),
        describe(pooled_v, config.block_k),
        out_THd,
        *choice,
        cu_seqlens,
        num_sequences,
        num_sequences.bit_length(),
        triton.cdiv(num_rows, pattern.key_block),
        q.stride(1),
        LOG2_E / math.sqrt(width),
        H=num_heads,
        D=padded,
        MOST=pattern.most_blocks(num_rows),
        POOL=pattern.pool,
        WITH_FAR=with_far,
        ALONE=num_sequences == 1,
        BLOCK_Q=pattern.query_block,
        BLOCK_K=pattern.key_block,
        BLOCK_S=config.block_k,
        **config.options(),
    )
    return out_THd if padded == width else out_THd[:, :, :width].contiguous()


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """Return them as they are, or padded with zeros, such that the bulk copies can fetch rows."""
    width = tensors[0].shape[2]
    padded = max(MIN_WIDTH, triton.next_power_of_2(width))
    one_stride = len({x.stride(1) for x in tensors}) == 1
    if padded == width and one_stride and all(is_aligned(x) for x in tensors):
        return list(tensors)
    return [functional.pad(x, (0, padded - width)).contiguous() for x in tensors]
