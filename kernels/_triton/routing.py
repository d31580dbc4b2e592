"""Triton form of ``kernels.routing``: two launches, no atomics, no host synchronisation.

The first launch chooses experts and counts them per block of tokens.  The second adds
up the counts of the blocks before its own, so the row order is the stable one of the
reference whatever order the blocks run in.

Groups of experts lie in columns of their own, each padded to a power of two, so that a reshape
parts them.

Legend: T tokens of a block, E experts, K chosen experts, B blocks, M tiles, G groups of N
experts, C chosen groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.routing import LOWEST, Routing, num_tiles

LOWEST_KEY = tl.constexpr(LOWEST)
TILE_ELEMENTS = 2048  # tokens x experts of a block
MAX_BLOCK_T = 64


@triton.jit
def _num_valid(valid_ptr: tl.tensor, num_tokens: tl.tensor, HAS_VALID: tl.constexpr) -> tl.tensor:
    """How many leading tokens are somebody's."""
    if HAS_VALID:
        return tl.minimum(tl.load(valid_ptr), num_tokens)
    return num_tokens


@triton.jit
def _open_groups(
    key_TE: tl.tensor,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The keys with -inf in the groups that are not chosen."""
    key_TGN = tl.reshape(key_TE, (BLOCK_T, BLOCK_G, BLOCK_N))
    first_TG = tl.max(key_TGN, axis=2)
    best_TG = tl.argmax(key_TGN, axis=2, tie_break_left=True)
    is_first_TGN = tl.arange(0, BLOCK_N)[None, None, :] == best_TG[:, :, None]
    second_TG = tl.max(tl.where(is_first_TGN, -float("inf"), key_TGN), axis=2)
    sum_TG = 0.5 * first_TG + 0.5 * second_TG
    group_G = tl.arange(0, BLOCK_G)
    sum_TG = tl.where((group_G < G)[None, :], sum_TG, -float("inf"))
    is_open_TG = tl.zeros((BLOCK_T, BLOCK_G), tl.int32)
    for _ in tl.static_range(C):
        best_T = tl.argmax(sum_TG, axis=1, tie_break_left=True)
        hit_TG = group_G[None, :] == best_T[:, None]
        is_open_TG = tl.where(hit_TG, 1, is_open_TG)
        sum_TG = tl.where(hit_TG, -float("inf"), sum_TG)
    key_TGN = tl.where(is_open_TG[:, :, None] > 0, key_TGN, -float("inf"))
    return tl.reshape(key_TGN, (BLOCK_T, BLOCK_G * BLOCK_N))


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_tokens: tl.tensor,
    HAS_VALID: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    token_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_N
    column_E = tl.arange(0, BLOCK_E)
    expert_E = column_E // BLOCK_N * (E // G) + column_E % BLOCK_N
    real_E = (column_E < G * BLOCK_N) & (column_E % BLOCK_N < E // G)
    valid_T = token_T < _num_valid(valid_ptr, num_tokens, HAS_VALID)
    inside_TE = (token_T < num_tokens)[:, None] & real_E[None, :]
    offset_TE = token_T.to(tl.int64)[:, None] * E + expert_E[None, :]
    logit_TE = tl.load(logits_ptr + offset_TE, mask=inside_TE, other=0.0)
    bias_E = tl.load(bias_ptr + expert_E, mask=real_E, other=0.0)

    key_TE = tl.sigmoid(logit_TE) + bias_E[None, :]
    key_TE = tl.where(key_TE >= LOWEST_KEY, key_TE, LOWEST_KEY)  # NaN compares false
    key_TE = tl.where(real_E[None, :], key_TE, -float("inf"))
    if C < G:
        key_TE = _open_groups(key_TE, G, C, BLOCK_T, BLOCK_G, BLOCK_N)
    slot_TE = tl.full((BLOCK_T, BLOCK_E), -1, tl.int32)
    for k in tl.static_range(K):
        best_T = tl.argmax(key_TE, axis=1, tie_break_left=True)
        hit_TE = column_E[None, :] == best_T[:, None]
        slot_TE = tl.where(hit_TE, k, slot_TE)
        key_TE = tl.where(hit_TE, -float("inf"), key_TE)
    chosen_TE = (slot_TE >= 0) & inside_TE

    log_score_TE = tl.minimum(logit_TE, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit_TE)))
    log_score_TE = tl.where(slot_TE >= 0, log_score_TE, -float("inf"))
    exp_TE = tl.exp(log_score_TE - tl.max(log_score_TE, axis=1)[:, None])
    weight_TE = exp_TE / tl.sum(exp_TE, axis=1)[:, None]
    out_TE = token_T.to(tl.int64)[:, None] * K + slot_TE
    weight_TE = tl.where(valid_T[:, None], weight_TE, 0.0)
    tl.store(weights_ptr + out_TE, weight_TE, mask=chosen_TE)
    wide_expert_TE = tl.broadcast_to(expert_E[None, :], (BLOCK_T, BLOCK_E))
    wide_expert_TE = tl.where(valid_T[:, None], wide_expert_TE, 0)
    tl.store(experts_ptr + out_TE, wide_expert_TE, mask=chosen_TE)
    count_E = tl.sum((chosen_TE & valid_T[:, None]).to(tl.int32), axis=0)
    tl.store(counts_ptr + block * E + expert_E, count_E, mask=real_E)


@triton.jit
def _tile_map(
    tile_M: tl.tensor,
    load_E: tl.tensor,
    end_E: tl.tensor,
    expert_E: tl.tensor,
    E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    tiles_E = (load_E + (BLOCK_ROWS - 1)) // BLOCK_ROWS
    tile_end_E = tl.cumsum(tiles_E, axis=0)
    expert_M = tl.sum((tile_end_E[None, :] <= tile_M[:, None]).to(tl.int32), axis=1)
    first_E = end_E - load_E - (tile_end_E - tiles_E) * BLOCK_ROWS
    owner_ME = expert_E[None, :] == expert_M[:, None]
    row_M = tl.sum(tl.where(owner_ME, first_E[None, :], 0), axis=1) + tile_M * BLOCK_ROWS
    used_M = expert_M < E
    return tl.where(used_M, expert_M, -1), tl.where(used_M, row_M, 0)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "num_tiles"])
def _lay_out_kernel(
    experts_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    load_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_blocks: tl.tensor,
    num_tiles: tl.tensor,
    HAS_VALID: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    load_E = tl.zeros((BLOCK_E,), tl.int32)
    before_E = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_blocks, BLOCK_T):
        block_B = start + tl.arange(0, BLOCK_T)
        inside_BE = (block_B < num_blocks)[:, None] & (expert_E < E)[None, :]
        offset_BE = block_B[:, None] * E + expert_E[None, :]
        count_BE = tl.load(counts_ptr + offset_BE, mask=inside_BE, other=0)
        load_E += tl.sum(count_BE, axis=0)
        before_E += tl.sum(tl.where((block_B < block)[:, None], count_BE, 0), axis=0)
    end_E = tl.cumsum(load_E, axis=0)

    token_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    slot_TE = tl.full((BLOCK_T, BLOCK_E), -1, tl.int32)
    valid_T = token_T < _num_valid(valid_ptr, num_tokens, HAS_VALID)
    for k in tl.static_range(K):
        chosen_T = tl.load(experts_ptr + token_T * K + k, mask=valid_T, other=-1)
        slot_TE = tl.where(expert_E[None, :] == chosen_T[:, None], k, slot_TE)
        if HAS_VALID:  # an idle token's choices name row 0, and the rows past the last token 0
            idle_T = (token_T < num_tokens) & (token_T >= tl.load(valid_ptr))
            tl.store(rows_ptr + token_T * K + k, tl.zeros((BLOCK_T,), tl.int32), mask=idle_T)
            tl.store(tokens_ptr + token_T * K + k, tl.zeros((BLOCK_T,), tl.int32), mask=idle_T)
    chosen_TE = (slot_TE >= 0).to(tl.int32)
    earlier_TE = tl.cumsum(chosen_TE, axis=0) - chosen_TE
    row_TE = (end_E - load_E + before_E)[None, :] + earlier_TE
    wide_token_TE = tl.broadcast_to(token_T[:, None], (BLOCK_T, BLOCK_E))
    tl.store(rows_ptr + token_T[:, None] * K + slot_TE, row_TE, mask=slot_TE >= 0)
    tl.store(tokens_ptr + row_TE, wide_token_TE, mask=slot_TE >= 0)

    if block == 0:
        tl.store(load_ptr + expert_E, load_E, mask=expert_E < E)
        tl.store(ends_ptr + expert_E, end_E, mask=expert_E < E)
    for start in range(block * BLOCK_T, num_tiles, num_blocks * BLOCK_T):
        tile_M = start + tl.arange(0, BLOCK_T)
        tile_expert_M, tile_row_M = _tile_map(tile_M, load_E, end_E, expert_E, E, BLOCK_ROWS)
        tl.store(tile_expert_ptr + tile_M, tile_expert_M, mask=tile_M < num_tiles)
        tl.store(tile_row_ptr + tile_M, tile_row_M, mask=tile_M < num_tiles)


def _empty_routing(logits_TE: Tensor, num_chosen: int, block_rows: int) -> Routing:
    num_tokens, num_experts = logits_TE.shape
    num_rows = num_tokens * num_chosen
    ints = torch.empty(0, dtype=torch.int32, device=logits_TE.device)
    tiles = num_tiles(num_rows, num_experts, block_rows)
    return Routing(
        weights_TK=logits_TE.new_empty(num_tokens, num_chosen),
        experts_TK=ints.new_empty(num_tokens, num_chosen),
        rows_TK=ints.new_empty(num_tokens, num_chosen),
        tokens_R=ints.new_empty(num_rows),
        load_E=ints.new_empty(num_experts),
        ends_E=ints.new_empty(num_experts),
        tile_expert_M=ints.new_empty(tiles),
        tile_row_M=ints.new_empty(tiles),
        block_rows=block_rows,
    )


def launch(
    logits_TE: Tensor,
    bias_E: Tensor,
    num_chosen: int,
    block_rows: int,
    num_valid: Tensor | None = None,
    groups: tuple[int, int] = (1, 1),
) -> Routing:
    """Run both kernels on checked inputs; with no tokens one block still writes the map.

    ``groups`` are their number and how many are chosen.
    """
    num_tokens, num_experts = logits_TE.shape
    num_groups, chosen_groups = groups if groups[1] < groups[0] else (1, 1)
    out = _empty_routing(logits_TE, num_chosen, block_rows)
    block_g = triton.next_power_of_2(num_groups)
    block_n = triton.next_power_of_2(num_experts // num_groups)
    block_e = block_g * block_n
    block_t = max(8, min(MAX_BLOCK_T, TILE_ELEMENTS // block_e))
    num_blocks = max(1, triton.cdiv(num_tokens, block_t))
    counts_BE = out.load_E.new_empty(num_blocks, num_experts)
    sizes = {"E": num_experts, "K": num_chosen, "BLOCK_T": block_t}
    valid = {"HAS_VALID": num_valid is not None}
    valid_1 = out.load_E if num_valid is None else num_valid  # not read if there is none
    _choose_kernel[(num_blocks,)](
        logits_TE,
        bias_E,
        valid_1,
        out.weights_TK,
        out.experts_TK,
        counts_BE,
        num_tokens,
        G=num_groups,
        C=chosen_groups,
        BLOCK_G=block_g,
        BLOCK_N=block_n,
        **valid,
        **sizes,
    )
    _lay_out_kernel[(num_blocks,)](
        out.experts_TK,
        counts_BE,
        valid_1,
        out.rows_TK,
        out.tokens_R,
        out.load_E,
        out.ends_E,
        out.tile_expert_M,
        out.tile_row_M,
        num_tokens,
        num_blocks,
        out.tile_expert_M.numel(),
        BLOCK_ROWS=block_rows,
        BLOCK_E=block_e,
        **valid,
        **sizes,
    )
    return out
