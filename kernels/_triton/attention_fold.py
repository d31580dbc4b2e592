"""The running softmax of a tile of queries over the keys that it may see.

Keys that all rows see come first, without masks; then global keys and the edges of the window.
One loop over all wins 1 % in a window and loses 10 % without one, scores that run a block ahead of
the softmax lose 30 % and more (docs/log.md).

Legend: Q query rows of a tile, K keys of a block, d head width.
"""

import triton
import triton.language as tl

from kernels._triton.numerics import dot


@triton.jit
def _softmax(
    score_QK: tl.tensor,
    peak_Q: tl.tensor,
    total_Q: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Weights of a block in base 2, new peak and total, and what older sums are multiplied by."""
    new_peak_Q = tl.maximum(peak_Q, tl.max(score_QK, axis=1) * scale)
    shift_Q = new_peak_Q
    if MASKED:  # a row may have seen nothing yet
        shift_Q = tl.where(new_peak_Q == -float("inf"), 0.0, new_peak_Q)
    weight_QK = tl.exp2(score_QK * scale - shift_Q[:, None])
    decay_Q = tl.exp2(peak_Q - shift_Q)
    return weight_QK, new_peak_Q, total_Q * decay_Q + tl.sum(weight_QK, axis=1), decay_Q


@triton.jit
def fold(
    q_Qd: tl.tensor,
    k_Kd: tl.tensor,
    v_Kd: tl.tensor,
    seen_QK: tl.tensor,
    peak_Q: tl.tensor,
    total_Q: tl.tensor,
    sum_Qd: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a block of keys to the running softmax: peak, total and weighted sum."""
    score_QK = dot(q_Qd, k_Kd.T, tl.zeros((q_Qd.shape[0], k_Kd.shape[0]), tl.float32))
    if MASKED:
        score_QK = tl.where(seen_QK, score_QK, -float("inf"))
    weight_QK, peak_Q, total_Q, decay_Q = _softmax(score_QK, peak_Q, total_Q, scale, MASKED)
    sum_Qd = dot(weight_QK.to(v_Kd.dtype), v_Kd, sum_Qd * decay_Q[:, None])
    return peak_Q, total_Q, sum_Qd


@triton.jit
def key_blocks(
    first: tl.tensor,
    last: tl.tensor,
    n: tl.tensor,
    num_global: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What rows first to last may see besides global keys, and what all of them see.

    The first key, the end, the number of blocks; of the blocks seen whole the first and the end.
    """
    low, high = num_global * 0, n
    full_low, full_high = low, high
    if HALF >= 0:
        low = tl.maximum(num_global, first - HALF)
        high = tl.minimum(n, last + HALF + 1)
        full_low = tl.maximum(low, last - HALF)
        full_high = tl.maximum(low, tl.minimum(high, first + HALF + 1))
    full_begin = tl.cdiv(full_low - low, BLOCK_K)
    full_end = tl.maximum(full_begin, (full_high - low) // BLOCK_K)
    return low, high, tl.cdiv(high - low, BLOCK_K), full_begin, full_end


@triton.jit
def _seen(
    is_global: tl.tensor,
    first: tl.tensor,
    key: tl.tensor,
    end: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Which keys of a block from ``key`` on each row from ``first`` on may see."""
    each_1K = tl.arange(0, BLOCK_K)[None, :]
    seen_QK = each_1K < end - key
    if HALF >= 0:
        reach = tl.where(is_global, 1 << 30, HALF)
        near_Q = first - key + tl.arange(0, BLOCK_Q)
        seen_QK = (tl.abs(near_Q[:, None] - each_1K) <= reach) & seen_QK
    return seen_QK


@triton.jit
def fold_keys(
    q_Qd: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    k_rows: tl.tensor,
    v_rows: tl.tensor,
    column: tl.tensor,
    num_global: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    full_begin: tl.tensor,
    full_end: tl.tensor,
    scale: tl.tensor,
    HALF: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Softmax of a tile over the first ``num_global`` keys and those from low to high."""
    BLOCK_Q: tl.constexpr = q_Qd.shape[0]
    peak_Q = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total_Q = tl.zeros((BLOCK_Q,), tl.float32)
    sum_Qd = tl.zeros((BLOCK_Q, q_Qd.shape[1]), tl.float32)
    num_global_blocks = tl.cdiv(num_global, BLOCK_K)
    for block in tl.range(full_begin, full_end):
        row = low + block * BLOCK_K
        k_Kd = k_rows.load([row, column])
        v_Kd = v_rows.load([row, column])
        peak_Q, total_Q, sum_Qd = fold(
            q_Qd, k_Kd, v_Kd, True, peak_Q, total_Q, sum_Qd, scale, False
        )
    num_others = tl.cdiv(high - low, BLOCK_K) - full_end + full_begin
    for turn in tl.range(num_global_blocks + num_others, disable_licm=True):
        block = turn - num_global_blocks
        block = tl.where(block < full_begin, block, block - full_begin + full_end)
        is_global = turn < num_global_blocks
        key = tl.where(is_global, start + turn * BLOCK_K, low + block * BLOCK_K)
        end = tl.where(is_global, start + num_global, high)
        k_Kd = k_rows.load([key, column])
        v_Kd = v_rows.load([key, column])
        if not ALONE:  # what is not finite in a stranger's row would turn 0 * x into NaN
            inside_K = key + tl.arange(0, BLOCK_K) < end
            v_Kd = tl.where(inside_K[:, None], v_Kd, 0.0)
        seen_QK = _seen(is_global, first, key, end, HALF, BLOCK_Q, BLOCK_K)
        peak_Q, total_Q, sum_Qd = fold(
            q_Qd, k_Kd, v_Kd, seen_QK, peak_Q, total_Q, sum_Qd, scale, True
        )
    return peak_Q, total_Q, sum_Qd
