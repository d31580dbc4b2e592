"""Which experts each token goes to, and in which order the experts see the rows.

One call gives everything that ``fused_moe`` needs: gate weights, the order of the rows, the
tile map, and the load of each expert; on a GPU it is one launch.  ``route_tokens`` begins with
the router's product, ``route_and_balance`` ends with the step of the selection bias.

    bytes   4 T E logits (with the product 2 T D + 4 E D), 16 T K choices, 12 E, 8 M
    FLOPs   2 T D E with the product, else none on matrix units: K passes over T E keys

Covered: sigmoid scores, selection bias, top-k, groups of experts, no dropped token.  Not
covered: capacity.  Every form gives the same bits each time it is run on the same inputs.

Legend: T tokens, D model, E experts, K chosen experts, R routed rows (T * K), M tiles, G groups
of N experts, C chosen groups, O owners of tokens.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import FLOATS, Form, Impl, check, select_impl

LOWEST = torch.finfo(torch.float32).min
FUSED_BYTES = 256 << 10  # of a router, up to which each program may read it for itself
FUSED_EXPERTS = 128  # beyond which the scores of a tile do not fit the registers


class Routing(NamedTuple):
    """Where every choice of every token goes.

    Rows are ordered by expert, then token.  Each tile is at most ``block_rows``
    consecutive rows of one expert; the number of tiles is a bound known without
    looking at the data, so unused ones close the list.

    Args:
        weights_TK: Gate weights, float32, each row sums to 1.
        experts_TK: Chosen experts, best first, int32.
        rows_TK: Row of choice k of token t, int32.
        tokens_R: Token behind each row, int32.
        load_E: Rows of each expert, int32.
        ends_E: Cumulative load: expert e owns rows [ends[e] - load[e], ends[e]), int32.
        tile_expert_M: Expert of each tile, -1 past the last, int32; M = ceil(R / block_rows) + E.
        tile_row_M: First row of each tile, 0 past the last, int32.
        block_rows: Most rows of a tile.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    rows_TK: Tensor
    tokens_R: Tensor
    load_E: Tensor
    ends_E: Tensor
    tile_expert_M: Tensor
    tile_row_M: Tensor
    block_rows: int


class Balance(NamedTuple):
    """How unevenly a step loads its experts, and where that moves the selection bias.

    Args:
        violation_1: Largest load over the mean load, minus 1, float32 [1]; 0 without rows.
        bias_E: The bias moved by the rate toward the mean load, then less its mean, float32.
    """

    violation_1: Tensor
    bias_E: Tensor


def num_tiles(num_rows: int, num_experts: int, block_rows: int) -> int:
    """Return how many tiles hold any distribution of the rows over the experts."""
    return -(-num_rows // block_rows) + num_experts


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    num_chosen: int,
    *,
    num_groups: int = 1,
    chosen_groups: int = 1,
    block_rows: int = 64,
    owner_T: Tensor | None = None,
    num_valid: Tensor | None = None,
    impl: Impl = "auto",
) -> Routing:
    """Choose experts for each token and lay out the rows by expert.

        s = sigmoid(logits)     chosen = the K largest of s + bias     w = s[chosen] / sum(s[chosen])

    With groups, only experts of the C groups whose two largest s + bias have the greatest sums
    can be chosen.

    Of equal scores, or sums, the lower expert, or group, wins.  A NaN score loses to every
    number, so a NaN token still takes K rows and disturbs no other; a group with fewer than two
    numbers loses to every other.

    Args:
        logits_TE: Router outputs, float32, contiguous.
        bias_E: Selection bias, float32; it moves the choice, never the weights.  With owners,
            a bias for each of them, [O, E].
        num_chosen: K, from 1 to E.
        num_groups: G, cuts the experts into runs of equal length, from 2 unless it is 1.
        chosen_groups: C, from 1 to G; they hold at least K experts.
        block_rows: Most rows of a tile, a power of two from 16.
        owner_T: Whose bias each token takes, int32, from 0 to O - 1, contiguous.
        num_valid: How many leading tokens are somebody's, int32 [1]; the others (of a captured
            graph that is wider than the step) take no row and weigh 0.  None = all.
        impl: Form to run.

    Returns:
        The routing; weights are differentiable in ``logits_TE``.  Rows past the last end are
        nobody's and name token 0.

    Raises:
        ValueError: A shape, dtype or count disagrees with the above.

    Source:
        DeepSeek-V3, arXiv:2412.19437, eq. 12-16 and section 2.1.2 on node-limited routing.
    """
    counts = _Counts(num_chosen, num_groups, chosen_groups, block_rows)
    check("logits_TE", logits_TE, (None, None), torch.float32)
    by = _By(bias_E, owner_T, num_valid)
    _check(len(logits_TE), logits_TE.shape[1], by, counts)
    form = select_impl(impl, logits_TE, bias_E)
    if form == "triton":
        from kernels._triton.routing import launch  # noqa: PLC0415 - Triton is optional

        groups = (num_groups, chosen_groups)
        given = (logits_TE, bias_E, num_chosen, block_rows, num_valid, groups)
        return launch(*given, owner_T=owner_T)[0]
    return _route(logits_TE, by, counts, form)


def route_tokens(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor,
    num_chosen: int,
    *,
    num_groups: int = 1,
    chosen_groups: int = 1,
    block_rows: int = 64,
    owner_T: Tensor | None = None,
    num_valid: Tensor | None = None,
    impl: Impl = "auto",
) -> Routing:
    """Do what ``route`` does to the scores of the tokens, logits = x router^T in float32.

    Args:
        x_TD: Tokens, float, contiguous.
        router_ED: A row for each expert, float, contiguous.
        bias_E: As in ``route``, and so are the others.
        num_chosen: K.
        num_groups: G.
        chosen_groups: C.
        block_rows: Most rows of a tile.
        owner_T: Whose bias each token takes.
        num_valid: How many leading tokens are somebody's.
        impl: Form to run.

    Returns:
        The routing; weights are differentiable in tokens and router.

    Raises:
        ValueError: A shape, dtype or count disagrees with the above.
    """
    counts = _Counts(num_chosen, num_groups, chosen_groups, block_rows)
    check("x_TD", x_TD, (None, None), FLOATS)
    check("router_ED", router_ED, (None, x_TD.shape[1]), FLOATS)
    by = _By(bias_E, owner_T, num_valid)
    _check(len(x_TD), len(router_ED), by, counts)
    form = select_impl(impl, x_TD, router_ED, bias_E)
    if form == "triton":
        from kernels._triton.routing import launch  # noqa: PLC0415 - Triton is optional

        given = (bias_E, num_chosen, block_rows, num_valid, (num_groups, chosen_groups))
        if fits_one_launch(router_ED):
            return launch(x_TD, *given, router_ED, owner_T=owner_T)[0]
        logits_TE = functional.linear(x_TD.float(), router_ED.float())
        return launch(logits_TE, *given, owner_T=owner_T)[0]
    logits_TE = functional.linear(x_TD.float(), router_ED.float())
    return _route(logits_TE, by, counts, form)


def fits_one_launch(router_ED: Tensor) -> bool:
    """Tell whether the router's product is part of the launch, or one before it."""
    num_bytes = router_ED.numel() * router_ED.element_size()
    return num_bytes <= FUSED_BYTES and len(router_ED) <= FUSED_EXPERTS


def route_and_balance(
    logits_TE: Tensor,
    bias_E: Tensor,
    num_chosen: int,
    bias_rate: float,
    *,
    num_groups: int = 1,
    chosen_groups: int = 1,
    block_rows: int = 64,
    num_valid: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Routing, Balance]:
    """Do what ``route`` does, and measure and correct how evenly the experts are loaded.

        violation = max(load) / mean(load) - 1
        moved = bias + rate * sign(mean(load) - load)       next bias = moved - mean(moved)

    Args:
        logits_TE: As in ``route``, and so are the others.
        bias_E: Selection bias; the result is a new one.
        num_chosen: K.
        bias_rate: Step of the bias.
        num_groups: G.
        chosen_groups: C.
        block_rows: Most rows of a tile.
        num_valid: How many leading tokens are somebody's.
        impl: Form to run.

    Raises:
        ValueError: A shape, dtype or count disagrees with the above.

    Source:
        Wang et al. 2024, algorithm 1 and eq. 4 (arXiv:2408.15664).
    """
    counts = _Counts(num_chosen, num_groups, chosen_groups, block_rows)
    check("logits_TE", logits_TE, (None, None), torch.float32)
    by = _By(bias_E, None, num_valid)
    _check(len(logits_TE), logits_TE.shape[1], by, counts)
    form = select_impl(impl, logits_TE, bias_E)
    if form == "triton":
        from kernels._triton.routing import launch  # noqa: PLC0415 - Triton is optional

        groups = (num_groups, chosen_groups)
        given = (logits_TE, bias_E, num_chosen, block_rows, num_valid, groups)
        routing, balance = launch(*given, bias_rate=bias_rate)
        return routing, cast("Balance", balance)
    routing = _route(logits_TE, by, counts, form)
    return routing, _balance(routing.load_E, bias_E.detach(), bias_rate)


class _Counts(NamedTuple):
    """What is chosen, and rows of a tile."""

    chosen: int
    num_groups: int
    chosen_groups: int
    block_rows: int


class _By(NamedTuple):
    """What moves the choice, and which tokens choose."""

    bias_E: Tensor
    owner_T: Tensor | None
    num_valid: Tensor | None

    def bias(self) -> Tensor:
        """Return the bias of all tokens [E], or of each [T, E]."""
        bias_E = self.bias_E.detach()
        return bias_E if self.owner_T is None else bias_E[self.owner_T.long()]


def _check(num_tokens: int, num_experts: int, by: _By, counts: _Counts) -> None:
    if by.owner_T is None:
        check("bias_E", by.bias_E, (num_experts,), torch.float32)
    else:
        check("bias_E", by.bias_E, (None, num_experts), torch.float32)
        check("owner_T", by.owner_T, (num_tokens,), torch.int32)
    _check_counts(num_experts, counts.chosen, counts.num_groups, counts.chosen_groups)
    if counts.block_rows < 16 or counts.block_rows & (counts.block_rows - 1):
        message = f"block_rows: expected a power of two from 16, got {counts.block_rows}"
        raise ValueError(message)
    if by.num_valid is not None:
        check("num_valid", by.num_valid, (1,), torch.int32)


def _route(logits_TE: Tensor, by: _By, counts: _Counts, form: Form) -> Routing:
    choose = choose_reference if form == "reference" else _choose_torch
    experts_TK = choose(logits_TE.detach(), by.bias(), *counts[:3])
    # softmax of log-sigmoids = sigmoids over their sum, without 0 / 0
    weights_TK = functional.logsigmoid(logits_TE.gather(1, experts_TK)).softmax(dim=1)
    num_valid = by.num_valid
    if num_valid is None:
        return _lay_out(weights_TK, experts_TK, logits_TE.shape[1], counts.block_rows)
    idle_T1 = (torch.arange(len(logits_TE), device=logits_TE.device) >= num_valid).unsqueeze(1)
    owned = experts_TK.masked_fill(idle_T1, logits_TE.shape[1])  # sorts behind every expert
    weights_TK = weights_TK.masked_fill(idle_T1, 0.0)
    routing = _lay_out(weights_TK, owned, logits_TE.shape[1], counts.block_rows)
    num_owned = num_valid * counts.chosen
    nobodys_R = torch.arange(experts_TK.numel(), device=logits_TE.device) >= num_owned
    return routing._replace(
        experts_TK=routing.experts_TK.masked_fill(idle_T1, 0),
        rows_TK=routing.rows_TK.masked_fill(idle_T1, 0),
        tokens_R=routing.tokens_R.masked_fill(nobodys_R, 0),
    )


def _balance(load_E: Tensor, bias_E: Tensor, rate: float) -> Balance:
    total, num_experts = load_E.sum(), load_E.numel()
    violation_1 = (load_E.max() * num_experts / total.clamp(min=1) - 1.0).float().view(1)
    moved_E = bias_E + rate * torch.sign(total - load_E.long() * num_experts)
    return Balance(violation_1.where(total > 0, 0.0), moved_E - moved_E.mean())


def _check_counts(num_experts: int, num_chosen: int, num_groups: int, chosen_groups: int) -> None:
    if not 1 <= num_chosen <= num_experts:
        message = f"num_chosen: expected 1 to {num_experts} experts, got {num_chosen}"
        raise ValueError(message)
    size, rest = divmod(num_experts, num_groups) if num_groups > 0 else (0, 0)
    if rest or (size < 2 and num_groups != 1):
        expected = f"to cut {num_experts} experts into equal runs from 2"
        message = f"num_groups: expected {expected}, got {num_groups}"
        raise ValueError(message)
    if not -(-num_chosen // size) <= chosen_groups <= num_groups:
        expected = f"{-(-num_chosen // size)} to {num_groups}"
        message = f"chosen_groups: expected {expected}, got {chosen_groups}"
        raise ValueError(message)


def choose_reference(
    logits_TE: Tensor, bias: Tensor, num_chosen: int, num_groups: int = 1, chosen_groups: int = 1
) -> Tensor:
    """The selection, int64 [T, K]; one bias for all tokens [E] or one for each [T, E]."""
    keys_TE = (logits_TE.sigmoid() + bias).nan_to_num(LOWEST, neginf=LOWEST)
    if chosen_groups < num_groups:
        keys_TGN = keys_TE.unflatten(1, (num_groups, -1))
        ordered_TGN = keys_TGN.sort(dim=2, descending=True).values
        sums_TG = 0.5 * ordered_TGN[:, :, 0] + 0.5 * ordered_TGN[:, :, 1]  # halves: no overflow
        ranked_TG = sums_TG.sort(dim=1, descending=True, stable=True).indices
        closed_TG = torch.zeros_like(sums_TG, dtype=torch.bool)
        closed_TG.scatter_(1, ranked_TG[:, chosen_groups:], True)
        keys_TE = keys_TGN.masked_fill(closed_TG.unsqueeze(2), -torch.inf).flatten(1)
    return keys_TE.sort(dim=1, descending=True, stable=True).indices[:, :num_chosen]


def _choose_torch(
    logits_TE: Tensor, bias: Tensor, num_chosen: int, num_groups: int, chosen_groups: int
) -> Tensor:
    keys_TE = (logits_TE.sigmoid() + bias).nan_to_num(LOWEST, neginf=LOWEST)
    return _largest(open_groups(keys_TE, num_groups, chosen_groups), num_chosen)


def open_groups(keys_TE: Tensor, num_groups: int, chosen_groups: int) -> Tensor:
    """Return the selection keys, finite [T, E], with -inf in the groups that are not chosen."""
    if chosen_groups == num_groups:
        return keys_TE
    keys_TGN = keys_TE.unflatten(1, (num_groups, -1))
    sums_TG = (0.5 * keys_TGN.topk(2, dim=2).values).sum(dim=2)
    closed_TG = torch.ones_like(sums_TG, dtype=torch.bool)
    closed_TG.scatter_(1, _largest(sums_TG, chosen_groups), False)
    open_TGN: Tensor = keys_TGN.masked_fill(closed_TG.unsqueeze(2), -torch.inf)
    return open_TGN.flatten(1)


def _largest(keys_TN: Tensor, count: int) -> Tensor:
    """Return where the largest keys are, int64 [T, count], and overwrite those keys.

    Rounds of argmax, which names the first of equals and sorts nothing.
    """
    indices = torch.empty(keys_TN.shape[0], count, dtype=torch.int64, device=keys_TN.device)
    for k in range(count):
        best_T1 = keys_TN.argmax(dim=1, keepdim=True)
        indices[:, k : k + 1] = best_T1
        keys_TN.scatter_(1, best_T1, -torch.inf)
    return indices


def _lay_out(weights_TK: Tensor, experts_TK: Tensor, num_experts: int, block_rows: int) -> Routing:
    """Order the choices by expert and cut the order into tiles; no value leaves the device."""
    device, num_rows = experts_TK.device, experts_TK.numel()
    order = experts_TK.flatten().sort(stable=True)
    rows_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    rows_R[order.indices] = torch.arange(num_rows, dtype=torch.int32, device=device)
    every_E = torch.arange(num_experts, device=device)
    ends_E = torch.searchsorted(order.values, every_E, right=True, out_int32=True)
    load_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    tile_expert_M, tile_row_M = _tile_map(load_E, ends_E, num_rows, block_rows)
    return Routing(
        weights_TK=weights_TK,
        experts_TK=experts_TK.to(torch.int32),
        rows_TK=rows_R.view_as(experts_TK),
        tokens_R=(order.indices // experts_TK.shape[1]).to(torch.int32),
        load_E=load_E,
        ends_E=ends_E,
        tile_expert_M=tile_expert_M,
        tile_row_M=tile_row_M,
        block_rows=block_rows,
    )


def _tile_map(
    load_E: Tensor, ends_E: Tensor, num_rows: int, block_rows: int
) -> tuple[Tensor, Tensor]:
    num_experts = load_E.numel()
    tiles_E = (load_E + (block_rows - 1)) // block_rows
    tile_ends_E = tiles_E.cumsum(0, dtype=torch.int32)
    tile_M = torch.arange(
        num_tiles(num_rows, num_experts, block_rows), dtype=torch.int32, device=load_E.device
    )
    expert_M = torch.searchsorted(tile_ends_E, tile_M, right=True, out_int32=True)
    used_M = expert_M < num_experts
    index_M = expert_M.clamp(max=num_experts - 1)
    first_E = ends_E - load_E - (tile_ends_E - tiles_E) * block_rows
    row_M = first_E[index_M] + tile_M * block_rows
    return expert_M.masked_fill(~used_M, -1), row_M.masked_fill(~used_M, 0)
