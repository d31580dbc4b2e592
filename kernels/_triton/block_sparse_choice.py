"""Triton form of steps 1 to 4 of ``kernels.block_sparse``: which blocks of keys are attended to.

Scores are products of spans with queries, so that the maximum over queries stays in a thread.
The best are found by bisection of their bits, not by a sort; equal ones by their order.

Legend: S spans of a tile, Q queries of a block, J blocks of keys, d head width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.attention_tiles import describe
from kernels._triton.numerics import dot
from kernels._triton.tiles import find_tile
from kernels.attention_config import tiles
from kernels.block_sparse import SparsePattern

MEAN_ROWS, MEAN_COLUMNS = 256, 32


class Choice(NamedTuple):
    """Blocks of keys that each block of queries attends to.

    Args:
        blocks: Ascending, int32 [H, slots, most].
        counts: How many, int32 [H, slots].
        is_seen: The same as a map, int8 [H, slots, J].
    """

    blocks: Tensor
    counts: Tensor
    is_seen: Tensor


@triton.jit
def _mean_kernel(
    pooled_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Mean of the keys of a sequence, from those of its spans."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(cu_ptr + sequence)
    n = tl.load(cu_ptr + sequence + 1) - start
    column_C = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (start // POOL + sequence).to(tl.int64)
    sum_SC = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, tl.cdiv(n, POOL), BLOCK_S):
        span_S = first + tl.arange(0, BLOCK_S)
        count_S = tl.minimum(n - span_S * POOL, POOL)
        pooled_SC = tl.load(
            pooled_ptr + ((row + span_S)[:, None] * H + head) * D + column_C[None, :],
            mask=(count_S > 0)[:, None] & (column_C < D)[None, :],
            other=0.0,
        )
        sum_SC += pooled_SC.to(tl.float32) * count_S[:, None].to(tl.float32)
    mean_C = tl.div_rn(tl.sum(sum_SC, axis=0), tl.maximum(n, 1).to(tl.float32))
    tl.store(mean_ptr + (sequence * H + head) * D + column_C, mean_C, mask=column_C < D)


@triton.jit(do_not_specialize=["num_sequences", "num_halvings", "num_blocks"])
def _score_kernel(
    q_rows: tl.tensor,
    pooled_rows: tl.tensor,
    mean_ptr: tl.tensor,
    score_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    num_sequences: tl.tensor,
    num_halvings: tl.tensor,
    num_blocks: tl.tensor,
    stride_h: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    POOL: tl.constexpr,
    SPANS: tl.constexpr,  # of a block of keys
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    slot = tl.program_id(0)
    head = tl.program_id(1)
    sequence, start, end, tile = find_tile(slot, cu_ptr, num_sequences, num_halvings, BLOCK_Q)
    n = end - start
    first = tile * BLOCK_Q
    if first < n:
        q_Qd = q_rows.load([start + first, head * stride_h])
        mean_d = tl.load(mean_ptr + (sequence * H + head) * D + tl.arange(0, D))
        shift_Q = tl.sum(q_Qd.to(tl.float32) * mean_d[None, :], axis=1)
        shift_Q = tl.where(first + tl.arange(0, BLOCK_Q) < n, shift_Q, float("inf"))
        row = start // POOL + sequence
        out_ptr = score_ptr + (head * tl.num_programs(0) + slot).to(tl.int64) * num_blocks
        for span in range(0, tl.cdiv(n, POOL), BLOCK_S):
            pooled_Sd = pooled_rows.load([row + span, head * D])
            score_SQ = dot(pooled_Sd, q_Qd.T, tl.zeros((BLOCK_S, BLOCK_Q), tl.float32))
            score_SQ = score_SQ - shift_Q[None, :]
            best_S = tl.max(score_SQ, axis=1)  # of those that are not NaN
            inside_S = (span + tl.arange(0, BLOCK_S)) * POOL < n
            best_S = tl.where(inside_S & (best_S > -float("inf")), best_S, -float("inf"))
            best_J = tl.max(tl.reshape(best_S, (BLOCK_S // SPANS, SPANS)), axis=1)
            block_J = span // SPANS + tl.arange(0, BLOCK_S // SPANS)
            tl.store(out_ptr + block_J, best_J, mask=block_J < num_blocks)


@triton.jit(do_not_specialize=["num_sequences", "num_halvings", "num_blocks"])
def _choose_blocks_kernel(
    score_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    seen_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    num_sequences: tl.tensor,
    num_halvings: tl.tensor,
    num_blocks: tl.tensor,
    HALF: tl.constexpr,
    NUM_GLOBAL: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    MOST: tl.constexpr,
    WITH_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    slot = tl.program_id(0)
    line = (tl.program_id(1) * tl.num_programs(0) + slot).to(tl.int64)
    _, start, end, tile = find_tile(slot, cu_ptr, num_sequences, num_halvings, BLOCK_Q)
    n = end - start
    first = tile * BLOCK_Q
    if first < n:
        last = tl.minimum(first + BLOCK_Q, n) - 1
        block_J = tl.arange(0, BLOCK_J)
        key_J = block_J * BLOCK_K
        inside_J = key_J < n
        forced_J = (key_J <= last + HALF) & (key_J + BLOCK_K > first - HALF)
        forced_J = (forced_J | (key_J < NUM_GLOBAL)) & inside_J
        candidate_J = inside_J & (forced_J == 0)
        score_J = tl.load(score_ptr + line * num_blocks + block_J, mask=candidate_J, other=0.0)
        score_J = tl.where(score_J == 0.0, 0.0, score_J)  # -0 too
        # floats in their order as integers from 1; 0 is nobody's
        bits_J = score_J.to(tl.int32, bitcast=True)
        order_J = (bits_J ^ ((bits_J >> 31) & 0x7FFFFFFF)).to(tl.int64) + (1 << 31) + 1
        order_J = tl.where(candidate_J, order_J, 0)
        wanted = tl.minimum(NUM_SELECTED, tl.sum(candidate_J.to(tl.int32)))
        bound = tl.full((), 0, tl.int64)
        for bit in range(33):
            higher = bound + (tl.full((), 1, tl.int64) << (32 - bit))
            enough = tl.sum((order_J >= higher).to(tl.int32)) >= wanted
            bound = tl.where(enough, higher, bound)
        above_J = order_J > bound
        equal_J = (order_J == bound) & candidate_J
        left = wanted - tl.sum(above_J.to(tl.int32))
        chosen_J = above_J | (equal_J & (tl.cumsum(equal_J.to(tl.int32)) <= left))
        seen_J = forced_J | chosen_J
        place_J = tl.cumsum(seen_J.to(tl.int32)) - 1
        tl.store(blocks_ptr + line * MOST + place_J, block_J, mask=seen_J & (place_J < MOST))
        tl.store(counts_ptr + line, tl.sum(seen_J.to(tl.int32)))
        if WITH_MAP:
            seen_base = seen_ptr + line * num_blocks
            tl.store(seen_base + block_J, seen_J.to(tl.int8), mask=block_J < num_blocks)


def launch_choice(
    q_THd: Tensor, pooled_PHd: Tensor, cu_seqlens: Tensor, pattern: SparsePattern
) -> Choice:
    """Run the kernels on checked, aligned inputs; slots are those of blocks of queries."""
    num_rows, num_heads, width = q_THd.shape
    num_sequences = cu_seqlens.numel() - 1
    config = tiles()["scores"]
    device, sizes = q_THd.device, (num_sequences, num_sequences.bit_length())
    mean_BHd = torch.empty(num_sequences, num_heads, width, dtype=torch.float32, device=device)
    columns = min(MEAN_COLUMNS, width)
    _mean_kernel[(num_sequences, num_heads, triton.cdiv(width, columns))](
        pooled_PHd,
        mean_BHd,
        cu_seqlens,
        H=num_heads,
        D=width,
        POOL=pattern.pool,
        BLOCK_S=MEAN_ROWS,
        BLOCK_C=columns,
        num_warps=4,
    )
    num_slots = num_rows // pattern.query_block + num_sequences
    num_blocks = triton.cdiv(num_rows, pattern.key_block)
    scores = torch.empty(num_heads, num_slots, num_blocks, dtype=torch.float32, device=device)
    spans = pattern.key_block // pattern.pool
    grid = (num_slots, num_heads)
    block_s = max(config.block_k, spans)
    _score_kernel[grid](
        describe(q_THd, pattern.query_block),
        describe(pooled_PHd, block_s),
        mean_BHd,
        scores,
        cu_seqlens,
        *sizes,
        num_blocks,
        q_THd.stride(1),
        H=num_heads,
        D=width,
        POOL=pattern.pool,
        SPANS=spans,
        BLOCK_Q=pattern.query_block,
        BLOCK_S=block_s,
        **config.options(),
    )
    most, with_map = pattern.most_blocks(num_rows), pattern.far == "pooled"
    blocks = torch.empty(num_heads, num_slots, most, dtype=torch.int32, device=device)
    counts = torch.empty(num_heads, num_slots, dtype=torch.int32, device=device)
    seen_size = (num_heads, num_slots, num_blocks) if with_map else (0,)
    is_seen = torch.empty(seen_size, dtype=torch.int8, device=device)
    _choose_blocks_kernel[grid](
        scores,
        blocks,
        counts,
        is_seen,
        cu_seqlens,
        *sizes,
        num_blocks,
        HALF=pattern.window // 2,
        NUM_GLOBAL=pattern.num_global,
        NUM_SELECTED=pattern.num_selected,
        MOST=most,
        WITH_MAP=with_map,
        BLOCK_Q=pattern.query_block,
        BLOCK_K=pattern.key_block,
        BLOCK_J=triton.next_power_of_2(num_blocks),
        num_warps=4,
    )
    return Choice(blocks, counts, is_seen)
