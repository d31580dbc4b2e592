"""Triton form of ``kernels.attention`` for short sequences: packed rows, one launch.

A program owns a block of packed rows and one head.  Short sequences share a block: each
row finds its own sequence by bisection of the offsets, and keys of other sequences are
masked.  Values that are not finite are set to zero before the product and come back as
NaN scores of the rows that may see them, so they cannot reach a neighbour through 0 * NaN.

Legend: Q query rows of a block, K keys of a block, d head width.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.attention_tiles import fits, launch_tiles
from kernels._triton.numerics import dot
from kernels.attention import AttentionPattern

BLOCK_Q = 64
BLOCK_K = 64
MIN_BLOCK_D = 16  # smallest dimension of a matrix product
WIDE_ROW_BYTES = 256  # beyond a 16 bit head of 128, 4 warps and 64 keys spill (sm_90 compile test)
LOG2_E = math.log2(math.e)


@triton.jit
def _sequence_bounds(
    row_Q: tl.tensor, cu_ptr: tl.tensor, num_sequences: tl.tensor, num_halvings: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """First row and end of the sequence that holds each row."""
    low_Q = tl.zeros_like(row_Q)  # the last offset known to be <= row
    high_Q = low_Q + num_sequences  # the first one known to be > row
    for _ in range(num_halvings):
        middle_Q = (low_Q + high_Q) // 2
        right_Q = tl.load(cu_ptr + middle_Q) <= row_Q
        low_Q = tl.where(right_Q, middle_Q, low_Q)
        high_Q = tl.where(right_Q, high_Q, middle_Q)
    return tl.load(cu_ptr + low_Q), tl.load(cu_ptr + low_Q + 1)


@triton.jit
def _key_ranges(
    first: tl.tensor,
    last: tl.tensor,
    start_Q: tl.tensor,
    end_Q: tl.tensor,
    HALF: tl.constexpr,
    NUM_GLOBAL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Two ranges of keys that hold all the block's rows may see: globals, then the rest."""
    global_low = tl.min(start_Q)
    global_high = global_low
    low = global_low
    high = tl.max(end_Q)
    if HALF < 0:
        return global_low, global_high, low, high
    # a block without a global query lies in one sequence, past its global positions;
    # with NUM_GLOBAL = 0 it may hold several, and its window spans them
    if first - tl.max(start_Q) >= NUM_GLOBAL:
        global_high = tl.minimum(global_low + NUM_GLOBAL, high)
        low = tl.maximum(global_high, first - HALF)
        high = tl.minimum(high, last + HALF + 1)
    return global_low, global_high, low, high


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "num_halvings"])
def _attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_sequences: tl.tensor,
    num_halvings: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    k_stride_t: tl.tensor,
    k_stride_h: tl.tensor,
    v_stride_t: tl.tensor,
    v_stride_h: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # half the window, -1 = full
    NUM_GLOBAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, num_rows) - 1
    row_Q = first + tl.arange(0, BLOCK_Q)
    inside_Q = row_Q < num_rows
    start_Q, end_Q = _sequence_bounds(tl.minimum(row_Q, last), cu_ptr, num_sequences, num_halvings)
    column_d = tl.arange(0, BLOCK_D)
    inside_d = (column_d < D)[None, :]
    q_offset = row_Q.to(tl.int64)[:, None] * q_stride_t + head * q_stride_h + column_d[None, :]
    q_Qd = tl.load(q_ptr + q_offset, mask=inside_Q[:, None] & inside_d, other=0.0)

    global_low, global_high, low, high = _key_ranges(first, last, start_Q, end_Q, HALF, NUM_GLOBAL)
    num_global_blocks = tl.cdiv(global_high - global_low, BLOCK_K)
    num_blocks = num_global_blocks + tl.cdiv(high - low, BLOCK_K)
    peak_Q = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total_Q = tl.zeros((BLOCK_Q,), tl.float32)
    sum_Qd = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for block in range(num_blocks):
        is_global = block < num_global_blocks
        base = tl.where(is_global, global_low, low - num_global_blocks * BLOCK_K)
        key_K = base + block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside_K = key_K < tl.where(is_global, global_high, high)
        wide_K = key_K.to(tl.int64)[:, None]
        k_offset = wide_K * k_stride_t + head * k_stride_h + column_d[None, :]
        k_Kd = tl.load(k_ptr + k_offset, mask=inside_K[:, None] & inside_d, other=0.0)
        v_offset = wide_K * v_stride_t + head * v_stride_h + column_d[None, :]
        v_Kd = tl.load(v_ptr + v_offset, mask=inside_K[:, None] & inside_d, other=0.0)
        finite_Kd = tl.abs(v_Kd.to(tl.float32)) < float("inf")
        broken_K = tl.max((~finite_Kd).to(tl.int32), axis=1) > 0
        v_Kd = tl.where(finite_Kd, v_Kd, 0.0)

        seen_QK = (key_K[None, :] >= start_Q[:, None]) & (key_K[None, :] < end_Q[:, None])
        seen_QK = seen_QK & inside_K[None, :]
        if HALF >= 0:
            near_QK = tl.abs(row_Q[:, None] - key_K[None, :]) <= HALF
            near_QK = near_QK | (key_K[None, :] - start_Q[:, None] < NUM_GLOBAL)
            seen_QK = seen_QK & (near_QK | (row_Q - start_Q < NUM_GLOBAL)[:, None])
        score_QK = dot(q_Qd, k_Kd.T, tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)) * scale
        score_QK = tl.where(broken_K[None, :], float("nan"), score_QK)
        score_QK = tl.where(seen_QK, score_QK, -float("inf"))

        new_peak_Q = tl.maximum(peak_Q, tl.max(score_QK, axis=1))
        shift_Q = tl.where(new_peak_Q == -float("inf"), 0.0, new_peak_Q)
        weight_QK = tl.exp2(score_QK - shift_Q[:, None])
        decay_Q = tl.exp2(peak_Q - shift_Q)
        total_Q = total_Q * decay_Q + tl.sum(weight_QK, axis=1)
        sum_Qd = dot(weight_QK.to(v_Kd.dtype), v_Kd, sum_Qd * decay_Q[:, None])
        peak_Q = new_peak_Q

    out_offset = (row_Q.to(tl.int64)[:, None] * H + head) * D + column_d[None, :]
    out_Qd = (sum_Qd / total_Q[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offset, out_Qd, mask=inside_Q[:, None] & inside_d)


def launch(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, pattern: AttentionPattern
) -> Tensor:
    """Run the kernel on checked inputs; long sequences have one of their own."""
    if fits(q_THd, k_THd, v_THd, cu_seqlens):
        return launch_tiles(q_THd, k_THd, v_THd, cu_seqlens, pattern)[0]
    num_rows, num_heads, width = q_THd.shape
    out_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
    if out_THd.numel() == 0:
        return out_THd
    num_sequences = cu_seqlens.numel() - 1
    block_d = max(MIN_BLOCK_D, triton.next_power_of_2(width))
    is_wide = block_d * q_THd.element_size() > WIDE_ROW_BYTES
    _attention_kernel[(triton.cdiv(num_rows, BLOCK_Q), num_heads)](
        q_THd,
        k_THd,
        v_THd,
        out_THd,
        cu_seqlens,
        num_rows,
        num_sequences,
        num_sequences.bit_length(),
        *q_THd.stride()[:2],
        *k_THd.stride()[:2],
        *v_THd.stride()[:2],
        LOG2_E * width**-0.5,
        H=num_heads,
        D=width,
        HALF=-1 if pattern.window is None else pattern.window // 2,
        NUM_GLOBAL=pattern.num_global,
        BLOCK_Q=BLOCK_Q,
        BLOCK_K=BLOCK_K // 2 if is_wide else BLOCK_K,
        BLOCK_D=block_d,
        num_warps=8 if is_wide else 4,
        num_stages=2,
    )
    return out_THd
