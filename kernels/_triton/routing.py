"""Triton form of ``kernels.routing``: one launch, no host synchronisation, the reference's order.

Each program chooses for a run of consecutive tokens, counts what they chose by expert and ranks
each choice among its own.  Behind a barrier of the whole grid it adds up the counts of the
programs before it, so the row order is the stable one whatever order the programs run in.  A
program with one tile keeps its choices in registers meanwhile; one that is alone waits for nobody.

Measured on an H200 inside a CUDA graph (2026-11-28): 128 experts of which 8, T = 1: 4.7 us, 16, 64
and 256: 7.4 to 7.6, 2,048: 14, 16,384: 38; 256 experts, 16,384: 88; 16 experts of which 2, 256: 4.9.
Balance costs .2 us more.  By bytes alone .04 us at T = 256: latencies and a launch are the rest.

Legend: T tokens of a tile, D model, E experts in columns, K chosen experts, B programs,
R choices, M tiles of the map, G groups of N experts, C chosen groups.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.barrier import barrier_word, grid_barrier, num_processors
from kernels._triton.numerics import INTERPRET
from kernels._triton.routing_choice import WORD_TOKENS, choose, columns
from kernels.routing import Balance, Routing, num_tiles

TILE_KEYS = 1024  # tokens x experts of a tile: four keys a thread, for latency
ALONE_KEYS = 2048  # of all tokens, up to which one program is faster than several that wait
MANY_KEYS = 4096  # of a tile where programs have several
SCORE_TOKENS = 32  # most of a tile of scores; more spill
NUM_REGISTERS, MOST_REGISTERS = 65536, 255  # of a processor, all for its one program; of a thread
WARP_COUNTS = 512  # programs x experts that a warp adds up at once
WARP_CHOICES = 64  # that a warp puts in their rows at once
WARP_TILES = 32  # of the map that a warp clears at once
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
def _choose_run(
    rows_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    router_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    owner_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    experts_ptr: tl.tensor,
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
) -> tl.tensor:
    """Choose tile by tile, and write the rank of each choice; return how many take each column."""
    count_E = tl.zeros((BLOCK_G * BLOCK_N,), tl.int32)
    for start in range(first, last, BLOCK_T):
        place_TE, is_chosen_TE, _, rank_TE, more_E = choose(
            *(scores_ptr, router_ptr, bias_ptr, owner_ptr, weights_ptr, experts_ptr),
            *(start, last, num_valid, HAS_OWNER, E, K, G, C, D),
            *(BLOCK_T, BLOCK_D, BLOCK_G, BLOCK_N),
        )
        tl.store(rows_ptr + place_TE, rank_TE + count_E[None, :], mask=is_chosen_TE)
        count_E += more_E
    return count_E


@triton.jit
def _place(
    rows_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    place: tl.tensor,
    row: tl.tensor,
    is_chosen: tl.tensor,
    is_owned: tl.tensor,
    K: tl.constexpr,
) -> None:
    """Write rows of choices, and tokens of rows.

    An idle token's choices name row 0, and the rows past the last token 0.
    """
    tl.store(rows_ptr + place, tl.where(is_owned, row, 0), mask=is_chosen)
    token = tl.where(is_owned, place // K, 0)
    tl.store(tokens_ptr + tl.where(is_owned, row, place), token, mask=is_chosen)


@triton.jit
def _counts(
    counts_ptr: tl.tensor,
    other_B: tl.tensor,
    num_programs: tl.tensor,
    expert_E: tl.tensor,
    real_E: tl.tensor,
    E: tl.constexpr,
) -> tl.tensor:
    """What the tokens of some programs chose."""
    inside_BE = (other_B < num_programs)[:, None] & real_E[None, :]
    offset_BE = other_B[:, None] * E + expert_E[None, :]
    return tl.load(counts_ptr + offset_BE, mask=inside_BE, other=0)


@triton.jit
def _add_counts(
    counts_ptr: tl.tensor,
    program: tl.tensor,
    num_programs: tl.tensor,
    expert_E: tl.tensor,
    real_E: tl.tensor,
    E: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Choices of all programs, and of those before this one."""
    both_BE = tl.zeros((BLOCK_B, expert_E.shape[0]), tl.int64)  # all above those before
    other_B = tl.arange(0, BLOCK_B)
    count_BE = _counts(counts_ptr, other_B, num_programs, expert_E, real_E, E)
    for _ in range(0, num_programs, BLOCK_B):
        wide_BE = count_BE.to(tl.int64)
        both_BE += (wide_BE << 32) + tl.where((other_B < program)[:, None], wide_BE, 0)
        other_B += BLOCK_B  # the next are on their way while these are added
        count_BE = _counts(counts_ptr, other_B, num_programs, expert_E, real_E, E)
    both_E = tl.sum(both_BE, axis=0)
    return (both_E >> 32).to(tl.int32), both_E.to(tl.int32)


@triton.jit
def _place_run(
    experts_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    row_E: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    num_valid: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Write rows and tokens of choices that were ranked tile by tile."""
    for start in range(first * K, last * K, BLOCK_R):
        choice_R = start + tl.arange(0, BLOCK_R)
        inside_R = choice_R < last * K
        chosen_R = tl.load(experts_ptr + choice_R, mask=inside_R, other=0)
        rank_R = tl.load(rows_ptr + choice_R, mask=inside_R, other=0)
        column_R = chosen_R // N * BLOCK_N + chosen_R % N
        row_R = tl.gather(row_E, column_R, 0) + rank_R
        is_owned_R = inside_R & (choice_R < num_valid * K)
        _place(rows_ptr, tokens_ptr, choice_R, row_R, inside_R, is_owned_R, K)


@triton.jit
def _clear_map(
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    program: tl.tensor,
    num_programs: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK_M: tl.constexpr,
) -> None:
    """Leave every tile unused, until an expert takes it."""
    for start in range(program * BLOCK_M, num_tiles, num_programs * BLOCK_M):
        tile_M = start + tl.arange(0, BLOCK_M)
        tl.store(tile_expert_ptr + tile_M, -1, mask=tile_M < num_tiles)
        tl.store(tile_row_ptr + tile_M, 0, mask=tile_M < num_tiles)


@triton.jit
def _weigh(
    load_E: tl.tensor,
    expert_E: tl.tensor,
    real_E: tl.tensor,
    bias_ptr: tl.tensor,
    violation_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    rate: tl.tensor,
    E: tl.constexpr,
) -> None:
    """How uneven the loads are, and the bias moved toward their mean."""
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


@triton.jit
def _write_map(
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    program: tl.tensor,
    num_programs: tl.tensor,
    most_tiles: tl.tensor,  # of an expert
    load_E: tl.tensor,
    expert_E: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
) -> tl.tensor:
    """Give each expert its tiles; return the rows' ends."""
    tiles_E = (load_E + (BLOCK_ROWS - 1)) // BLOCK_ROWS
    ends_E = tl.cumsum((tiles_E.to(tl.int64) << 32) + load_E, axis=0)
    end_E, tile_end_E = ends_E.to(tl.int32), (ends_E >> 32).to(tl.int32)
    for index in range(program, most_tiles, num_programs):
        tile_E = tile_end_E - tiles_E + index  # the expert's tile of this number
        is_tile_E = index < tiles_E
        tl.store(tile_expert_ptr + tile_E, expert_E, mask=is_tile_E)
        tl.store(tile_row_ptr + tile_E, end_E - load_E + index * BLOCK_ROWS, mask=is_tile_E)
    return end_E


@triton.jit
def _wait(word_ptr: tl.tensor, num_programs: tl.tensor, ALONE: tl.constexpr) -> None:
    """Let all programs see what any of them stored."""
    if ALONE:
        tl.debug_barrier()
    elif num_programs > 1:
        grid_barrier(word_ptr, num_programs)
    else:
        tl.debug_barrier()


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
    ALONE: tl.constexpr,  # one program
    ONE_TILE: tl.constexpr,  # of each program
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
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    num_valid = _num_valid(valid_ptr, num_tokens, HAS_VALID)
    first = program * run
    last = tl.minimum(first + run, num_tokens)
    expert_E, real_E = columns(E, G, BLOCK_G, BLOCK_N)
    scores = (scores_ptr, router_ptr, bias_ptr, owner_ptr, weights_ptr, experts_ptr)
    # what a launch that only lays out does not have
    place_TE, rank_TE, count_E = expert_E, expert_E, expert_E
    is_chosen_TE, is_owned_TE = real_E, real_E
    if CHOOSES:
        _clear_map(tile_expert_ptr, tile_row_ptr, program, num_programs, num_tiles, BLOCK_M)
        if ONE_TILE:
            place_TE, is_chosen_TE, is_owned_TE, rank_TE, count_E = choose(
                *scores,
                *(first, last, num_valid, HAS_OWNER, E, K, G, C, D),
                *(BLOCK_T, BLOCK_D, BLOCK_G, BLOCK_N),
            )
        else:
            count_E = _choose_run(
                rows_ptr,
                *scores,
                *(first, last, num_valid, HAS_OWNER, E, K, G, C, D),
                *(BLOCK_T, BLOCK_D, BLOCK_G, BLOCK_N),
            )
        if not ALONE:
            tl.store(counts_ptr + program * E + expert_E, count_E, mask=real_E)
        if LAYS_OUT:
            _wait(words_ptr + word, num_programs, ALONE)
    if LAYS_OUT:
        if ALONE:
            load_E, before_E = count_E, tl.zeros_like(count_E)
        else:
            others = (counts_ptr, program, num_programs)
            load_E, before_E = _add_counts(*others, expert_E, real_E, E, BLOCK_B)
        end_E = _write_map(
            *(tile_expert_ptr, tile_row_ptr, program, num_programs),
            *(tl.cdiv(num_tokens, BLOCK_ROWS), load_E, expert_E, BLOCK_ROWS),
        )
        row_E = end_E - load_E + before_E  # of the program's first choice of each expert
        if ONE_TILE:
            row_TE = row_E[None, :] + rank_TE
            _place(rows_ptr, tokens_ptr, place_TE, row_TE, is_chosen_TE, is_owned_TE, K)
        else:
            _place_run(
                *(experts_ptr, rows_ptr, tokens_ptr, row_E, first, last, num_valid),
                *(K, E // G, BLOCK_N, BLOCK_R),
            )
        if program == 0:
            tl.store(load_ptr + expert_E, load_E, mask=real_E)
            tl.store(ends_ptr + expert_E, end_E, mask=real_E)
            if HAS_BALANCE:
                given = (bias_ptr, violation_ptr, moved_ptr, bias_rate, E)
                _weigh(load_E, expert_E, real_E, *given)


class _Tiling(NamedTuple):
    """How the tokens are cut: programs, tokens of a program, of a tile, and warps."""

    num_programs: int
    run: int
    block_t: int
    num_warps: int


def _tiling(num_tokens: int, block_e: int, processors: int, *, has_product: bool) -> _Tiling:
    if has_product:
        is_long = num_tokens > LOW_TOKENS * processors
        block_t = max(32, min(WORD_TOKENS, PRODUCT_KEYS // block_e)) if is_long else LOW_TOKENS
        num_warps = 8 if is_long or block_e > 64 else 4
    else:
        block_t, alone_t, many_t = (
            max(8, min(SCORE_TOKENS, keys // block_e))
            for keys in (TILE_KEYS, ALONE_KEYS, MANY_KEYS)
        )
        if block_t < num_tokens <= alone_t:
            block_t = alone_t
        elif num_tokens > block_t * processors:
            block_t = many_t
        num_warps = 16 if block_t * block_e >= ALONE_KEYS else 8
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
    is_alone = tiling.num_programs == 1 and tiling.run == tiling.block_t
    in_parts = INTERPRET.value and not is_alone  # nobody may wait there
    phases = ((True, False), (False, True)) if in_parts else ((True, True),)
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
            ALONE=is_alone,
            ONE_TILE=tiling.run == tiling.block_t and not in_parts,
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
            BLOCK_B=max(1, WARP_COUNTS * tiling.num_warps // block_e),
            BLOCK_R=WARP_CHOICES * tiling.num_warps,
            BLOCK_M=WARP_TILES * tiling.num_warps,
            num_warps=tiling.num_warps,
            maxnreg=min(MOST_REGISTERS, NUM_REGISTERS // (32 * tiling.num_warps)),
            launch_cooperative_grid=True,
        )
    return out, balance
