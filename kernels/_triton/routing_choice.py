"""What a token chooses: the part of the router before any token knows of the others.

The largest key is found as an integer that orders like the float, and of equal ones the lowest
column: two reductions of a warp by one instruction each.  Tokens of a tile that chose an expert
are bits of one word, so a rank is a count of bits.

Groups of experts lie in columns of their own, each padded to a power of two, so that a reshape
parts them.

Legend: T tokens of a tile, D model, E experts in columns, K chosen experts, G groups of N experts,
C chosen groups.
"""

import triton
import triton.language as tl

from kernels._triton.numerics import dot
from kernels.routing import LOWEST

LOWEST_KEY = tl.constexpr(LOWEST)
TAKEN_KEY = tl.constexpr(-(2**31))  # below the integer of -inf
WORD_TOKENS = 64  # most of a tile: bits of a word


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
def _ordered(bits: tl.tensor) -> tl.tensor:
    """Integers that order like the floats of these bits, and the bits of such integers."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _slots(key_TE: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """Which choice of its token each column is, -1 for none."""
    column_E = tl.arange(0, key_TE.shape[1])
    key_TE = tl.where(key_TE == 0.0, 0.0, key_TE)  # -0 is 0
    order_TE = _ordered(key_TE.to(tl.int32, bitcast=True))
    for k in tl.static_range(K):
        best_T = tl.max(order_TE, axis=1)
        is_best_TE = order_TE == best_T[:, None]
        first_T = tl.min(tl.where(is_best_TE, column_E[None, :], key_TE.shape[1]), axis=1)
        order_TE = tl.where(column_E[None, :] == first_T[:, None], TAKEN_KEY + k, order_TE)
    return tl.where(order_TE < TAKEN_KEY + K, order_TE ^ TAKEN_KEY, -1)


@triton.jit
def _shares(logit_TE: tl.tensor, is_chosen_TE: tl.tensor) -> tl.tensor:
    """Sigmoids over the sum of those chosen, 0 elsewhere.

    With m = min(0, largest), 1 / (e^m + e^(m - x)) is e^-m times the sigmoid, and never 0 for all.
    """
    order_TE = _ordered(logit_TE.to(tl.int32, bitcast=True))
    most_T = _ordered(tl.max(tl.where(is_chosen_TE, order_TE, TAKEN_KEY), axis=1))
    m_T1 = tl.minimum(most_T.to(tl.float32, bitcast=True), 0.0)[:, None]
    score_TE = 1.0 / (tl.exp(m_T1) + tl.exp(m_T1 - logit_TE))
    score_TE = tl.where(is_chosen_TE, score_TE, 0.0)
    return score_TE / tl.sum(score_TE, axis=1)[:, None]


@triton.jit
def _num_bits(word: tl.tensor) -> tl.tensor:
    """How many bits of each word are set, int32; LLVM makes it one instruction."""
    WIDTH: tl.constexpr = word.dtype.primitive_bitwidth
    ALL: tl.constexpr = (1 << WIDTH) - 1
    word = word - ((word >> 1) & (ALL // 3))
    word = (word & (ALL // 5)) + ((word >> 2) & (ALL // 5))
    word = (word + (word >> 4)) & (ALL // 17)
    return ((word * (ALL // 255)) >> (WIDTH - 8)).to(tl.int32)


@triton.jit
def _ranks(is_owned_TE: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """How many tokens of the tile before each own a column, and how many of all."""
    WORD: tl.constexpr = tl.uint64 if is_owned_TE.shape[0] > 32 else tl.uint32
    bit_T = tl.full((is_owned_TE.shape[0],), 1, WORD) << tl.arange(0, is_owned_TE.shape[0]).to(WORD)
    word_E = tl.sum(tl.where(is_owned_TE, bit_T[:, None], 0), axis=0)
    return _num_bits(word_E[None, :] & (bit_T - 1)[:, None]), _num_bits(word_E)


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
def columns(
    E: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The expert of each column, in order, and whether it has one."""
    column_E = tl.arange(0, BLOCK_G * BLOCK_N)
    expert_E = column_E // BLOCK_N * (E // G) + column_E % BLOCK_N
    return expert_E, (column_E < G * BLOCK_N) & (column_E % BLOCK_N < E // G)


@triton.jit
def choose(
    scores_ptr: tl.tensor,
    router_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    owner_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    start: tl.tensor,
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
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Write weights and experts of a tile's tokens.

    Returns the place of each choice, whether a column is one and whether it takes a row, its rank
    in the tile, and how many tokens take each column.
    """
    expert_E, real_E = columns(E, G, BLOCK_G, BLOCK_N)
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
    weight_TE = _shares(logit_TE, slot_TE >= 0)

    is_chosen_TE = (slot_TE >= 0) & inside_TE
    is_valid_T1 = (token_T < num_valid)[:, None]
    place_TE = token_T[:, None] * K + slot_TE
    tl.store(weights_ptr + place_TE, tl.where(is_valid_T1, weight_TE, 0.0), mask=is_chosen_TE)
    wide_TE = tl.broadcast_to(expert_E[None, :], (BLOCK_T, BLOCK_G * BLOCK_N))
    tl.store(experts_ptr + place_TE, tl.where(is_valid_T1, wide_TE, 0), mask=is_chosen_TE)
    rank_TE, count_E = _ranks(is_chosen_TE & is_valid_T1)
    return place_TE, is_chosen_TE, is_chosen_TE & is_valid_T1, rank_TE, count_E
