"""Triton form of ``kernels.routing``: one launch, no host synchronisation, the reference's order.

Each program chooses for a run of consecutive tokens, counts what they chose by expert and ranks
each choice among its own.  Behind a barrier of the whole grid it adds up the counts of the
programs before it, so the row order is the stable one whatever order the programs run in.

The largest key is found as an integer that orders like the float, and of equal ones the lowest
column: two reductions of a warp by one instruction each.

Groups of experts lie in columns of their own, each padded to a power of two, so that a reshape
parts them.

Legend: T tokens of a tile, D model, E experts, K chosen experts, B programs, R choices, M tiles,
G groups of N experts, C chosen groups.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.barrier import barrier_word, grid_barrier, num_processors
from kernels._triton.numerics import INTERPRET, dot
from kernels.routing import LOWEST, Balance, Routing, num_tiles

LOWEST_KEY = tl.constexpr(LOWEST)
TAKEN_KEY = tl.constexpr(-(2**31))  # below the integer of -inf
TILE_KEYS = 1024  # tokens x experts of a tile: four keys a thread, for latency
FEW_TILES = 4  # of a program, beyond which tiles are twice as large
WARP_COUNTS = 512  # programs x experts that a warp adds up at once
WARP_CHOICES = 64  # that a warp puts in their rows at once
MAP_TILES = 8  # of the map at once
PRODUCT_KEYS = 2048  # of a tile with a product; more spill
LOW_TOKENS = 16  # of one where that would leave programs idle
PRODUCT_COLUMNS = 32


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


@triton.jit
def _slots(key_TE: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """Which choice of its token each column is, -1 for none."""
    column_E = tl.arange(0, key_TE.shape[1])
    bits_TE = tl.where(key_TE == 0.0, 0.0, key_TE).to(tl.int32, bitcast=True)  # -0 is 0
    order_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    slot_TE = tl.full(key_TE.shape, -1, tl.int32)
    for k in tl.static_range(K):
        best_T = tl.max(order_TE, axis=1)
        is_best_TE = order_TE == best_T[:, None]
        first_T = tl.min(tl.where(is_best_TE, column_E[None, :], key_TE.shape[1]), axis=1)
        hit_TE = column_E[None, :] == first_T[:, None]
        slot_TE = tl.where(hit_TE, k, slot_TE)
        order_TE = tl.where(hit_TE, TAKEN_KEY, order_TE)
    return slot_TE


@triton.jit
def _product(
    x_ptr: tl.tensor,
    router_ptr: tl.tensor,
    token_T: tl.tensor,
    num_tokens: tl.tensor,
    expert_E: tl.tensor,
    real_E: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Scores of the tokens, x @ router^T, float32 [T, E]."""
    logit_TE = tl.zeros((token_T.shape[0], expert_E.shape[0]), tl.float32)
    row_T1 = token_T.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK_D):
        column_D = start + tl.arange(0, BLOCK_D)
        inside_TD = (token_T < num_tokens)[:, None] & (column_D < D)[None, :]
        x_TD = tl.load(x_ptr + row_T1 + column_D[None, :], mask=inside_TD, other=0.0)
        inside_ED = real_E[:, None] & (column_D < D)[None, :]
        offset_ED = expert_E[:, None] * D + column_D[None, :]
        router_ED = tl.load(router_ptr + offset_ED, mask=inside_ED, other=0.0)
        logit_TE = dot(x_TD.to(tl.float32), router_ED.to(tl.float32).T, logit_TE)
    return logit_TE


@triton.jit
def _choose(
    scores_ptr: tl.tensor,
    router_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    owner_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    num_valid: tl.tensor,
    HAS_OWNER: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Weights and experts of the program's tokens, their ranks among its own, and its counts."""
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_N
    column_E = tl.arange(0, BLOCK_E)
    expert_E = column_E // BLOCK_N * (E // G) + column_E % BLOCK_N
    real_E = (column_E < G * BLOCK_N) & (column_E % BLOCK_N < E // G)
    count_E = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(first, last, BLOCK_T):
        token_T = start + tl.arange(0, BLOCK_T)
        inside_TE = (token_T < last)[:, None] & real_E[None, :]
        if D > 0:
            logit_TE = _product(scores_ptr, router_ptr, token_T, last, expert_E, real_E, D, BLOCK_D)
        else:
            offset_TE = token_T.to(tl.int64)[:, None] * E + expert_E[None, :]
            logit_TE = tl.load(scores_ptr + offset_TE, mask=inside_TE, other=0.0)
        if HAS_OWNER:
            owner_T = tl.load(owner_ptr + token_T, mask=token_T < last, other=0)
            offset_TE = owner_T[:, None] * E + expert_E[None, :]
            bias_TE = tl.load(bias_ptr + offset_TE, mask=inside_TE, other=0.0)
        else:
            bias_TE = tl.load(bias_ptr + expert_E, mask=real_E, other=0.0)[None, :]
        key_TE = tl.sigmoid(logit_TE) + bias_TE
        key_TE = tl.where(key_TE >= LOWEST_KEY, key_TE, LOWEST_KEY)  # NaN compares false
        key_TE = tl.where(real_E[None, :], key_TE, -float("inf"))
        if C < G:
            key_TE = _open_groups(key_TE, G, C, BLOCK_T, BLOCK_G, BLOCK_N)
        slot_TE = _slots(key_TE, K)
        chosen_TE = (slot_TE >= 0) & inside_TE

        log_score_TE = tl.minimum(logit_TE, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit_TE)))
        log_score_TE = tl.where(slot_TE >= 0, log_score_TE, -float("inf"))
        exp_TE = tl.exp(log_score_TE - tl.max(log_score_TE, axis=1)[:, None])
        weight_TE = exp_TE / tl.sum(exp_TE, axis=1)[:, None]
        valid_T1 = (token_T < num_valid)[:, None]
        out_TE = token_T.to(tl.int64)[:, None] * K + slot_TE
        tl.store(weights_ptr + out_TE, tl.where(valid_T1, weight_TE, 0.0), mask=chosen_TE)
        wide_TE = tl.broadcast_to(expert_E[None, :], (BLOCK_T, BLOCK_E))
        tl.store(experts_ptr + out_TE, tl.where(valid_T1, wide_TE, 0), mask=chosen_TE)
        owned_TE = (chosen_TE & valid_T1).to(tl.int32)
        rank_TE = tl.cumsum(owned_TE, axis=0) - owned_TE + count_E[None, :]
        tl.store(rows_ptr + out_TE, rank_TE, mask=chosen_TE)
        count_E += tl.sum(owned_TE, axis=0)
    tl.store(counts_ptr + tl.program_id(0) * E + expert_E, count_E, mask=real_E)


@triton.jit
def _tile_map(
    tile_M: tl.tensor,
    tile_end_E: tl.tensor,
    shift_E: tl.tensor,
    E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Expert and first row of each tile, from the ends in tiles and how rows are ahead of them."""
    expert_E = tl.arange(0, tile_end_E.shape[0])
    expert_M = tl.sum((tile_end_E[None, :] <= tile_M[:, None]).to(tl.int32), axis=1)
    owner_ME = expert_E[None, :] == expert_M[:, None]
    row_M = tl.sum(tl.where(owner_ME, shift_E[None, :], 0), axis=1) + tile_M * BLOCK_ROWS
    used_M = expert_M < E
    return tl.where(used_M, expert_M, -1), tl.where(used_M, row_M, 0)


@triton.jit
def _weigh(
    load_E: tl.tensor,
    bias_ptr: tl.tensor,
    violation_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    rate: tl.tensor,
    E: tl.constexpr,
) -> None:
    """How uneven the loads are, and the bias moved toward their mean."""
    expert_E = tl.arange(0, load_E.shape[0])
    real_E = expert_E < E
    total = tl.sum(load_E, axis=0)
    most = tl.max(load_E, axis=0)
    even = total.to(tl.float32) / E
    violation = tl.where(total > 0, most.to(tl.float32) / tl.maximum(even, 1e-30) - 1.0, 0.0)
    tl.store(violation_ptr, violation)
    error_E = total.to(tl.int64) - load_E.to(tl.int64) * E
    step_E = tl.where(error_E > 0, rate, tl.where(error_E < 0, -rate, 0.0))
    bias_E = tl.load(bias_ptr + expert_E, mask=real_E, other=0.0)
    moved_E = tl.where(real_E, bias_E + step_E, 0.0)
    tl.store(moved_ptr + expert_E, moved_E - tl.sum(moved_E, axis=0) / E, mask=real_E)


@triton.jit(
    do_not_specialize=["num_tokens", "run", "num_programs", "num_tiles", "word", "bias_rate"]
)
def _route_kernel(
    scores_ptr: tl.tensor,  # tokens [T, D] with a router, else logits [T, E]
    router_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    owner_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    load_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    violation_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    words_ptr: tl.tensor,
    num_tokens: tl.tensor,
    run: tl.tensor,  # tokens of a program
    num_programs: tl.tensor,
    num_tiles: tl.tensor,
    word: tl.tensor,
    bias_rate: tl.tensor,
    CHOOSES: tl.constexpr,
    LAYS_OUT: tl.constexpr,
    HAS_OWNER: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BALANCE: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    num_valid = _num_valid(valid_ptr, num_tokens, HAS_VALID)
    first = program * run
    last = tl.minimum(first + run, num_tokens)
    if CHOOSES:
        _choose(
            scores_ptr,
            router_ptr,
            bias_ptr,
            owner_ptr,
            weights_ptr,
            experts_ptr,
            rows_ptr,
            counts_ptr,
            first,
            last,
            num_valid,
            HAS_OWNER,
            E,
            K,
            G,
            C,
            D,
            BLOCK_T,
            BLOCK_D,
            BLOCK_G,
            BLOCK_N,
        )
    if CHOOSES and LAYS_OUT:
        if num_programs > 1:
            grid_barrier(words_ptr + word, num_programs)
        else:
            tl.debug_barrier()
    if LAYS_OUT:
        expert_E = tl.arange(0, BLOCK_E)
        load_BE = tl.zeros((BLOCK_B, BLOCK_E), tl.int32)
        before_BE = tl.zeros((BLOCK_B, BLOCK_E), tl.int32)
        for start in range(0, num_programs, BLOCK_B):
            other_B = start + tl.arange(0, BLOCK_B)
            inside_BE = (other_B < num_programs)[:, None] & (expert_E < E)[None, :]
            offset_BE = other_B[:, None] * E + expert_E[None, :]
            count_BE = tl.load(counts_ptr + offset_BE, mask=inside_BE, other=0)
            load_BE += count_BE
            before_BE += tl.where((other_B < program)[:, None], count_BE, 0)
        load_E, before_E = tl.sum(load_BE, axis=0), tl.sum(before_BE, axis=0)
        end_E = tl.cumsum(load_E, axis=0)
        row_E = end_E - load_E + before_E  # of the program's first choice of each expert

        for start in range(first * K, last * K, BLOCK_R):
            choice_R = start + tl.arange(0, BLOCK_R)
            inside_R = choice_R < last * K
            chosen_R = tl.load(experts_ptr + choice_R, mask=inside_R, other=0)
            rank_R = tl.load(rows_ptr + choice_R, mask=inside_R, other=0)
            owned_R = choice_R < num_valid * K
            # an idle token's choices name row 0, and the rows past the last token 0
            row_R = tl.where(owned_R, tl.gather(row_E, chosen_R, 0) + rank_R, 0)
            tl.store(rows_ptr + choice_R, row_R, mask=inside_R)
            token_R = tl.where(owned_R, choice_R // K, 0)
            tl.store(tokens_ptr + tl.where(owned_R, row_R, choice_R), token_R, mask=inside_R)

        tiles_E = (load_E + (BLOCK_ROWS - 1)) // BLOCK_ROWS
        tile_end_E = tl.cumsum(tiles_E, axis=0)
        shift_E = end_E - load_E - (tile_end_E - tiles_E) * BLOCK_ROWS
        for start in range(program * BLOCK_M, num_tiles, num_programs * BLOCK_M):
            tile_M = start + tl.arange(0, BLOCK_M)
            tile_expert_M, tile_row_M = _tile_map(tile_M, tile_end_E, shift_E, E, BLOCK_ROWS)
            tl.store(tile_expert_ptr + tile_M, tile_expert_M, mask=tile_M < num_tiles)
            tl.store(tile_row_ptr + tile_M, tile_row_M, mask=tile_M < num_tiles)
        if program == 0:
            tl.store(load_ptr + expert_E, load_E, mask=expert_E < E)
            tl.store(ends_ptr + expert_E, end_E, mask=expert_E < E)
            if HAS_BALANCE:
                _weigh(load_E, bias_ptr, violation_ptr, moved_ptr, bias_rate, E)


class _Tiling(NamedTuple):
    """How the tokens are cut: programs, tokens of a program, of a tile, and warps."""

    num_programs: int
    run: int
    block_t: int
    num_warps: int


def _tiling(num_tokens: int, block_e: int, processors: int, *, has_product: bool) -> _Tiling:
    if has_product:
        is_long = num_tokens > LOW_TOKENS * processors
        block_t = max(32, min(64, PRODUCT_KEYS // block_e)) if is_long else LOW_TOKENS
        num_warps = 8 if is_long or block_e > 64 else 4
    else:
        is_long = num_tokens * block_e > FEW_TILES * TILE_KEYS * processors
        block_t, num_warps = max(8, (2 if is_long else 1) * TILE_KEYS // block_e), 8
    tiles = max(1, triton.cdiv(num_tokens, block_t))
    run = triton.cdiv(tiles, processors) * block_t
    return _Tiling(max(1, triton.cdiv(num_tokens, run)), run, block_t, num_warps)


def _empty_routing(
    num_tokens: int, num_experts: int, num_chosen: int, block_rows: int, device: torch.device
) -> Routing:
    num_rows = num_tokens * num_chosen
    ints = torch.empty(0, dtype=torch.int32, device=device)
    tiles = num_tiles(num_rows, num_experts, block_rows)
    return Routing(
        weights_TK=torch.empty(num_tokens, num_chosen, device=device),
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
    scores: Tensor,
    bias_E: Tensor,
    num_chosen: int,
    block_rows: int,
    num_valid: Tensor | None = None,
    groups: tuple[int, int] = (1, 1),
    router_ED: Tensor | None = None,
    bias_rate: float | None = None,
    owner_T: Tensor | None = None,
) -> tuple[Routing, Balance | None]:
    """Run the kernel on checked inputs; with no tokens one program still writes the map.

    ``scores`` are logits [T, E], or with a router the tokens [T, D].  ``groups`` are their number
    and how many are chosen.
    """
    num_tokens, num_experts, device = scores.shape[0], bias_E.shape[-1], scores.device
    num_groups, chosen_groups = groups if groups[1] < groups[0] else (1, 1)
    block_g = triton.next_power_of_2(num_groups)
    block_n = triton.next_power_of_2(num_experts // num_groups)
    if router_ED is not None:
        block_n = max(block_n, triton.cdiv(16, block_g))  # the least of a product
    block_e = block_g * block_n
    tiling = _tiling(num_tokens, block_e, num_processors(device), has_product=router_ED is not None)
    width = 0 if router_ED is None else scores.shape[1]
    out = _empty_routing(num_tokens, num_experts, num_chosen, block_rows, device)
    balance = None
    if bias_rate is not None:
        balance = Balance(torch.empty(1, device=device), torch.empty_like(bias_E))
    unused = out.weights_TK
    words, word = barrier_word(device)
    wide_e = triton.next_power_of_2(num_experts)
    phases = ((True, False), (False, True)) if INTERPRET.value else ((True, True),)
    counts_BE = out.load_E.new_empty(tiling.num_programs, num_experts)
    for chooses, lays_out in phases:
        _route_kernel[(tiling.num_programs,)](
            scores,
            unused if router_ED is None else router_ED,
            bias_E,
            out.load_E if owner_T is None else owner_T,  # not read if there is none
            out.load_E if num_valid is None else num_valid,
            *out[:-1],
            unused if balance is None else balance.violation_1,
            unused if balance is None else balance.bias_E,
            counts_BE,
            words,
            num_tokens,
            tiling.run,
            tiling.num_programs,
            out.tile_expert_M.numel(),
            word,
            bias_rate or 0.0,
            CHOOSES=chooses,
            LAYS_OUT=lays_out,
            HAS_OWNER=owner_T is not None,
            HAS_VALID=num_valid is not None,
            HAS_BALANCE=balance is not None,
            E=num_experts,
            K=num_chosen,
            G=num_groups,
            C=chosen_groups,
            D=width,
            BLOCK_ROWS=block_rows,
            BLOCK_T=tiling.block_t,
            BLOCK_D=min(PRODUCT_COLUMNS, max(16, triton.next_power_of_2(width))),
            BLOCK_G=block_g,
            BLOCK_N=block_n,
            BLOCK_E=wide_e,
            BLOCK_B=max(1, WARP_COUNTS * tiling.num_warps // wide_e),
            BLOCK_R=WARP_CHOICES * tiling.num_warps,
            BLOCK_M=MAP_TILES,
            num_warps=tiling.num_warps,
            launch_cooperative_grid=True,
        )
    return out, balance
