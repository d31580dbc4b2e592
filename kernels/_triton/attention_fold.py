"""The running softmax of a tile of queries over the keys that it may see.

Three ways to walk over the keys (``kernels.attention_config``), chosen by measurement:

* split: keys that all rows see, without masks; then global keys and the edges of the window.
* joint: one loop over all, masked where it must be, so that loads never run dry; for a sequence
  that is alone, since rows of a stranger would have to be cut out of the values.
* ahead: split, and the scores of the next keys are multiplied while the softmax of these ones is
  computed (Shah et al. 2024, FlashAttention-3, arXiv:2407.08608, section 3.2).

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
def _scores(q_Qd: tl.tensor, k_Kd: tl.tensor) -> tl.tensor:
    return dot(q_Qd, k_Kd.T, tl.zeros((q_Qd.shape[0], k_Kd.shape[0]), tl.float32))


@triton.jit
def _fold_scores(
    score_QK: tl.tensor,
    v_Kd: tl.tensor,
    peak_Q: tl.tensor,
    total_Q: tl.tensor,
    sum_Qd: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    weight_QK, peak_Q, total_Q, decay_Q = _softmax(score_QK, peak_Q, total_Q, scale, MASKED)
    sum_Qd = dot(weight_QK.to(v_Kd.dtype), v_Kd, sum_Qd * decay_Q[:, None])
    return peak_Q, total_Q, sum_Qd


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
    score_QK = _scores(q_Qd, k_Kd)
    if MASKED:
        score_QK = tl.where(seen_QK, score_QK, -float("inf"))
    peak_Q, total_Q, sum_Qd = _fold_scores(score_QK, v_Kd, peak_Q, total_Q, sum_Qd, scale, MASKED)
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
    LOOP: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Softmax of a tile over the first ``num_global`` keys and those from low to high."""
    BLOCK_Q: tl.constexpr = q_Qd.shape[0]
    if IN_REGISTERS:  # what was computed stays there: half, which is exact
        q_Qd = (q_Qd * 0.5).to(q_Qd.dtype)
        scale = scale * 2.0
    peak_Q = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total_Q = tl.zeros((BLOCK_Q,), tl.float32)
    sum_Qd = tl.zeros((BLOCK_Q, q_Qd.shape[1]), tl.float32)
    num_global_blocks = tl.cdiv(num_global, BLOCK_K)
    if LOOP == "joint" and ALONE:
        num_turns = num_global_blocks + tl.cdiv(high - low, BLOCK_K)
        for turn in tl.range(num_turns, disable_licm=True):
            block = turn - num_global_blocks
            key = tl.where(block < 0, start + turn * BLOCK_K, low + block * BLOCK_K)
            k_Kd = k_rows.load([key, column])
            v_Kd = v_rows.load([key, column])
            score_QK = _scores(q_Qd, k_Kd)
            if (block < full_begin) | (block >= full_end):
                end = tl.where(block < 0, start + num_global, high)
                seen_QK = _seen(block < 0, first, key, end, HALF, BLOCK_Q, BLOCK_K)
                score_QK = tl.where(seen_QK, score_QK, -float("inf"))
            peak_Q, total_Q, sum_Qd = _fold_scores(
                score_QK, v_Kd, peak_Q, total_Q, sum_Qd, scale, True
            )
    else:
        if LOOP == "ahead":
            peak_Q, total_Q, sum_Qd = _fold_ahead(
                q_Qd,
                k_rows,
                v_rows,
                low + full_begin * BLOCK_K,
                full_end - full_begin,
                column,
                peak_Q,
                total_Q,
                sum_Qd,
                scale,
                BLOCK_K,
            )
        else:
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


@triton.jit
def _fold_ahead(
    q_Qd: tl.tensor,
    k_rows: tl.tensor,
    v_rows: tl.tensor,
    row: tl.tensor,
    num_blocks: tl.tensor,
    column: tl.tensor,
    peak_Q: tl.tensor,
    total_Q: tl.tensor,
    sum_Qd: tl.tensor,
    scale: tl.tensor,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Fold blocks that all rows see; the scores behind the last one are not used.

    Sums wait first in a turn: the compiler leaves what is issued after a wait under way until the
    next one.  Weights are rounded in the turn that multiplies them, so they stay in registers.
    """
    if num_blocks > 0:
        score_QK = _scores(q_Qd, k_rows.load([row, column]))
        weight_QK, peak_Q, total_Q, decay_Q = _softmax(score_QK, peak_Q, total_Q, scale, False)
        score_QK = _scores(q_Qd, k_rows.load([row + BLOCK_K, column]))
        for block in tl.range(1, num_blocks):
            key = row + block * BLOCK_K
            v_Kd = v_rows.load([key - BLOCK_K, column])
            sum_Qd = dot(weight_QK.to(v_Kd.dtype), v_Kd, sum_Qd)
            next_QK = _scores(q_Qd, k_rows.load([key + BLOCK_K, column]))
            weight_QK, peak_Q, total_Q, decay_Q = _softmax(score_QK, peak_Q, total_Q, scale, False)
            sum_Qd = sum_Qd * decay_Q[:, None]
            score_QK = next_QK
        v_Kd = v_rows.load([row + (num_blocks - 1) * BLOCK_K, column])
        sum_Qd = dot(weight_QK.to(v_Kd.dtype), v_Kd, sum_Qd)
    return peak_Q, total_Q, sum_Qd
