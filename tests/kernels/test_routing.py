import math
from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import Form, Impl
from kernels.routing import Routing, num_tiles, route, route_and_balance, route_tokens

NearCheck = Callable[[Tensor, Tensor], None]
FORMS = get_args(Form)
SHAPES = [(0, 4, 2), (1, 1, 1), (1, 3, 3), (37, 5, 2), (130, 16, 2), (67, 128, 8)]  # T, E, K
GROUPED = [  # T, E, K, groups, chosen groups; sizes that are no powers of two, the last DeepSeek-V3
    (0, 8, 2, 4, 2),
    (1, 4, 4, 2, 2),
    (37, 6, 2, 3, 1),
    (41, 20, 5, 4, 2),
    (29, 15, 7, 5, 3),
    (13, 256, 8, 8, 4),
]


def assert_same(got: Routing, want: Routing, assert_near: NearCheck) -> None:
    assert_near(got.weights_TK, want.weights_TK)
    for name in Routing._fields[1:-1]:
        got_value, want_value = getattr(got, name), getattr(want, name)
        assert got_value.dtype == torch.int32, name
        assert torch.equal(got_value, want_value), name
    assert got.block_rows == want.block_rows


def naive_choice(logits: list[float], bias: list[float], k: int) -> tuple[list[int], list[float]]:
    scores = [1.0 / (1.0 + math.exp(-x)) for x in logits]
    keys = [s + b for s, b in zip(scores, bias, strict=True)]
    chosen = sorted(range(len(keys)), key=lambda e: (-keys[e], e))[:k]
    total = sum(scores[e] for e in chosen)
    return chosen, [scores[e] / total for e in chosen]


def naive_open_experts(keys: list[float], num_groups: int, chosen_groups: int) -> list[int]:
    size = len(keys) // num_groups
    runs = [keys[g * size : (g + 1) * size] for g in range(num_groups)]
    sums = [sum(sorted(run)[-2:]) for run in runs]
    best = sorted(range(num_groups), key=lambda g: (-sums[g], g))[:chosen_groups]
    return [e for e in range(len(keys)) if e // size in best]


def test_reference_is_the_formula(assert_near: NearCheck) -> None:
    logits_TE, bias_E = torch.randn(29, 7), torch.randn(7) * 0.3
    routing = route(logits_TE, bias_E, 3, impl="reference")
    naive = [naive_choice(row, bias_E.tolist(), 3) for row in logits_TE.tolist()]
    assert routing.experts_TK.tolist() == [chosen for chosen, _ in naive]
    assert_near(routing.weights_TK, torch.tensor([weights for _, weights in naive]))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("num_groups", [1, 4])
def test_each_token_takes_its_owners_bias(
    impl: Impl, num_groups: int, device: torch.device, assert_near: NearCheck
) -> None:
    logits_TE = torch.randn(37, 16, device=device)
    bias_OE = torch.randn(3, 16, device=device)
    owner_T = torch.randint(3, (37,), dtype=torch.int32, device=device)
    choose = partial(route, num_groups=num_groups, chosen_groups=min(num_groups, 2))
    mixed = choose(logits_TE, bias_OE, 2, owner_T=owner_T, impl=impl)
    for owner in range(3):
        alone = choose(logits_TE[owner_T == owner], bias_OE[owner], 2, impl="reference")
        assert torch.equal(mixed.experts_TK[owner_T == owner], alone.experts_TK)
        assert_near(mixed.weights_TK[owner_T == owner], alone.weights_TK)
    with pytest.raises(ValueError, match="owner_T: expected contiguous"):
        route(logits_TE, bias_OE, 2, owner_T=owner_T[:-1], impl=impl)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), SHAPES)
def test_rows_are_in_stable_expert_order(
    impl: Impl, num_tokens: int, num_experts: int, num_chosen: int, device: torch.device
) -> None:
    logits_TE = torch.randn(num_tokens, num_experts, device=device)
    bias_E = torch.randn(num_experts, device=device) * 0.2
    routing = route(logits_TE, bias_E, num_chosen, block_rows=16, impl=impl)
    choices = [
        (expert, token, k)
        for token, experts in enumerate(routing.experts_TK.tolist())
        for k, expert in enumerate(experts)
    ]
    ordered = sorted(choices)
    rows_TK, tokens_R = routing.rows_TK.tolist(), routing.tokens_R.tolist()
    assert tokens_R == [token for _, token, _ in ordered]
    assert [rows_TK[token][k] for _, token, k in ordered] == list(range(len(ordered)))
    loads = [sum(e == expert for e, _, _ in choices) for expert in range(num_experts)]
    assert routing.load_E.tolist() == loads
    assert routing.ends_E.tolist() == torch.tensor(loads).cumsum(0).tolist()


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), SHAPES)
def test_tiles_cover_every_row_once(
    impl: Impl, num_tokens: int, num_experts: int, num_chosen: int, device: torch.device
) -> None:
    logits_TE = torch.randn(num_tokens, num_experts, device=device)
    bias_E = torch.zeros(num_experts, device=device)
    routing = route(logits_TE, bias_E, num_chosen, block_rows=16, impl=impl)
    ends, owner = routing.ends_E.tolist(), {}
    tiles = zip(routing.tile_expert_M.tolist(), routing.tile_row_M.tolist(), strict=True)
    for expert, first in tiles:
        if expert < 0:
            assert first == 0
            continue
        for row in range(first, min(first + 16, ends[expert])):
            assert row not in owner
            owner[row] = expert
    starts = [0, *ends]
    assert owner == {r: e for e in range(num_experts) for r in range(starts[e], ends[e])}
    assert routing.tile_expert_M.numel() == num_tiles(num_tokens * num_chosen, num_experts, 16)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), SHAPES)
def test_forms_agree(
    impl: Impl,
    num_tokens: int,
    num_experts: int,
    num_chosen: int,
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    logits_TE = torch.randn(num_tokens, num_experts, device=device)
    bias_E = torch.randn(num_experts, device=device) * 0.2
    want = route(logits_TE, bias_E, num_chosen, block_rows=32, impl="reference")
    got = route(logits_TE, bias_E, num_chosen, block_rows=32, impl=impl)
    assert_same(got, want, assert_near)
    ones_T = torch.ones(num_tokens, device=device)
    assert_near(got.weights_TK.sum(dim=1), ones_T)


@pytest.mark.parametrize("impl", FORMS)
def test_of_equal_scores_the_lower_expert_wins(impl: Impl, device: torch.device) -> None:
    logits_TE = torch.tensor([[0.0, 1.0, 1.0, 1.0], [50.0, 60.0, 70.0, 80.0]], device=device)
    routing = route(logits_TE, torch.zeros(4, device=device), 2, impl=impl)
    assert routing.experts_TK.tolist() == [[1, 2], [0, 1]]  # sigmoid(50) is 1 in float32


@pytest.mark.parametrize("impl", FORMS)
def test_nan_and_minus_infinity_lose_to_every_number(impl: Impl, device: torch.device) -> None:
    inf, nan = torch.inf, torch.nan
    logits_TE = torch.tensor([[nan, -3.0, 1.0], [nan, nan, nan], [0.0, 1.0, 2.0]], device=device)
    bias_E = torch.tensor([0.0, 0.0, 0.0], device=device)
    routing = route(logits_TE, bias_E, 2, impl=impl)
    assert routing.experts_TK.tolist() == [[2, 1], [0, 1], [2, 1]]
    assert routing.weights_TK.isnan().any(dim=1).tolist() == [False, True, False]
    closed_E = torch.tensor([0.0, 0.0, -inf], device=device)
    assert route(logits_TE[2:], closed_E, 2, impl=impl).experts_TK.tolist() == [[1, 0]]


@pytest.mark.parametrize("impl", FORMS)
def test_bias_moves_the_choice_and_not_the_weights(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    logits_TE = torch.tensor([[2.0, 1.0, 0.0]], device=device).expand(70, 3).contiguous()
    bias_E = torch.tensor([-9.0, 0.0, 9.0], device=device)
    routing = route(logits_TE, bias_E, 1, block_rows=16, impl=impl)
    assert routing.load_E.tolist() == [0, 0, 70]
    assert_near(routing.weights_TK, torch.ones(70, 1))
    both = route(logits_TE, bias_E, 2, impl=impl)
    pair = torch.sigmoid(torch.tensor([0.0, 1.0]))
    assert_near(both.weights_TK, (pair / pair.sum()).expand(70, 2))


@pytest.mark.parametrize("impl", FORMS)
def test_weights_survive_scores_that_underflow(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    logits_TE = torch.full((1, 4), -200.0, device=device)
    routing = route(logits_TE, torch.zeros(4, device=device), 2, impl=impl)
    assert_near(routing.weights_TK, torch.full((1, 2), 0.5))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradient_of_the_weights(impl: Impl) -> None:
    logits_TE = torch.randn(5, 6, requires_grad=True)
    routing = route(logits_TE, torch.zeros(6), 2, impl=impl)
    routing.weights_TK[:, 0].sum().backward()
    scores = logits_TE.detach().sigmoid()
    first, second = (scores.gather(1, routing.experts_TK[:, k : k + 1].long()) for k in (0, 1))
    expected = second / (first + second).square() * first * (1.0 - first)
    assert logits_TE.grad is not None
    got = logits_TE.grad.gather(1, routing.experts_TK[:, :1].long())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("num_chosen", "num_groups", "chosen_groups"), [(5, 4, 2), (1, 6, 3)])
def test_reference_chooses_from_the_best_groups(
    num_chosen: int, num_groups: int, chosen_groups: int
) -> None:
    logits_TE, bias_E = torch.randn(40, 24), torch.randn(24) * 0.3
    choose = partial(route, num_groups=num_groups, chosen_groups=chosen_groups)
    routing = choose(logits_TE, bias_E, num_chosen, impl="reference")
    keys_TE = logits_TE.double().sigmoid() + bias_E
    moved = 0
    for chosen, keys in zip(routing.experts_TK.tolist(), keys_TE.tolist(), strict=True):
        allowed = naive_open_experts(keys, num_groups, chosen_groups)
        assert chosen == sorted(allowed, key=lambda e: (-keys[e], e))[:num_chosen]
        moved += chosen != sorted(range(24), key=lambda e: (-keys[e], e))[:num_chosen]
    assert moved > 0  # groups do close experts


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_forms_agree_on_groups(
    impl: Impl,
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    num_tokens, num_experts, num_chosen, num_groups, chosen_groups = shape
    logits_TE = torch.randn(num_tokens, num_experts, device=device)
    logits_TE[num_tokens // 2 :, ::3] = torch.nan
    logits_TE[: num_tokens // 4] = torch.nan
    bias_E = torch.randn(num_experts, device=device) * 0.2
    bias_E[-1] = -torch.inf
    choose = partial(route, num_groups=num_groups, chosen_groups=chosen_groups)
    want = choose(logits_TE, bias_E, num_chosen, impl="reference")
    got = choose(logits_TE, bias_E, num_chosen, impl=impl)
    assert_same(got, want, assert_near)


@pytest.mark.parametrize("impl", FORMS)
def test_of_equal_sums_the_lower_group_wins(impl: Impl, device: torch.device) -> None:
    logits_TE = torch.tensor(
        [[0.0, 0.0, 1.0, -1.0, 0.0, 0.0], [60.0, 50.0, 0.0, 0.0, 70.0, 80.0]], device=device
    )
    bias_E = torch.zeros(6, device=device)
    one, two = (
        route(logits_TE, bias_E, 2, num_groups=3, chosen_groups=c, impl=impl).experts_TK.tolist()
        for c in (1, 2)
    )
    assert one == [[0, 1], [0, 1]]  # sigmoid(1) + sigmoid(-1) is 2 sigmoid(0)
    assert two == [[2, 0], [0, 1]]


@pytest.mark.parametrize("impl", FORMS)
def test_a_group_with_fewer_than_two_numbers_loses(impl: Impl, device: torch.device) -> None:
    inf, nan = torch.inf, torch.nan
    logits_TE = torch.tensor(
        [[nan, 9.0, -9.0, -9.0], [nan, nan, nan, -9.0], [nan] * 4, [-inf, -inf, nan, 0.0]],
        device=device,
    )
    bias_E = torch.zeros(4, device=device)
    routing = route(logits_TE, bias_E, 2, num_groups=2, chosen_groups=1, impl=impl)
    assert routing.experts_TK.tolist() == [[2, 3], [3, 2], [0, 1], [0, 1]]
    assert routing.load_E.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("impl", FORMS)
def test_with_all_groups_chosen_nothing_is_closed(impl: Impl, device: torch.device) -> None:
    logits_TE, bias_E = torch.randn(23, 8, device=device), torch.zeros(8, device=device)
    plain = route(logits_TE, bias_E, 3, impl=impl)
    grouped = route(logits_TE, bias_E, 3, num_groups=4, chosen_groups=4, impl=impl)
    for name in Routing._fields[:-1]:
        assert torch.equal(getattr(grouped, name), getattr(plain, name)), name


@pytest.mark.parametrize(
    ("num_groups", "chosen_groups", "message"),
    [
        (0, 1, "num_groups: expected to cut 8 experts"),
        (3, 1, "num_groups: expected to cut 8 experts into equal runs from 2, got 3"),
        (8, 4, "num_groups: expected to cut 8 experts into equal runs from 2, got 8"),
        (4, 1, "chosen_groups: expected 2 to 4, got 1"),
        (4, 5, "chosen_groups: expected 2 to 4, got 5"),
    ],
)
def test_bad_groups_are_refused(num_groups: int, chosen_groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(
            torch.zeros(3, 8),
            torch.zeros(8),
            3,
            num_groups=num_groups,
            chosen_groups=chosen_groups,
        )


@pytest.mark.parametrize(("num_chosen", "block_rows"), [(0, 64), (5, 64), (2, 48), (2, 8)])
def test_bad_counts_are_refused(num_chosen: int, block_rows: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        route(torch.zeros(3, 4), torch.zeros(4), num_chosen, block_rows=block_rows)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("num_valid", [0, 1, 9, 37])
@pytest.mark.parametrize("groups", [(1, 1), (3, 2)])
def test_idle_tokens_take_no_row_and_disturb_nobody(
    impl: Impl,
    num_valid: int,
    groups: tuple[int, int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    logits_TE = torch.randn(37, 6, device=device)
    logits_TE[num_valid:] = torch.nan
    bias_E = torch.zeros(6, device=device)
    count = torch.tensor([num_valid], dtype=torch.int32, device=device)
    choose = partial(route, num_groups=groups[0], chosen_groups=groups[1], block_rows=16, impl=impl)
    routing = choose(logits_TE, bias_E, 2, num_valid=count)
    alone = choose(logits_TE[:num_valid].contiguous(), bias_E, 2)
    assert_near(routing.weights_TK[:num_valid], alone.weights_TK)
    assert not routing.weights_TK[num_valid:].any()
    for name in ("experts_TK", "rows_TK"):
        assert torch.equal(getattr(routing, name)[:num_valid], getattr(alone, name))
        assert not getattr(routing, name)[num_valid:].any()
    assert torch.equal(routing.tokens_R[: 2 * num_valid], alone.tokens_R)
    assert not routing.tokens_R[2 * num_valid :].any()
    assert torch.equal(routing.load_E, alone.load_E)
    assert torch.equal(routing.ends_E, alone.ends_E)
    used = (routing.tile_expert_M >= 0).sum()
    assert torch.equal(routing.tile_expert_M[:used], alone.tile_expert_M[: int(used)])


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("num_experts", [1, 7, 64])
def test_all_tokens_to_one_expert(
    impl: Impl, num_experts: int, device: torch.device, assert_near: NearCheck
) -> None:
    logits_TE = torch.randn(53, num_experts, device=device)
    bias_E = torch.zeros(num_experts, device=device)
    bias_E[num_experts // 2] = 9.0
    routing = route(logits_TE, bias_E, 1, block_rows=16, impl=impl)
    assert routing.load_E.tolist() == [53 * (e == num_experts // 2) for e in range(num_experts)]
    assert routing.tokens_R.tolist() == list(range(53))
    assert routing.tile_row_M[:4].tolist() == [0, 16, 32, 48]
    assert routing.tile_expert_M.tolist() == [num_experts // 2] * 4 + [-1] * num_experts
    assert_near(routing.weights_TK, torch.ones(53, 1))


@pytest.mark.parametrize("impl", FORMS)
def test_a_token_s_choice_does_not_depend_on_its_place(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    logits_TE = torch.randn(211, 16, device=device)
    bias_E = torch.randn(16, device=device) * 0.2
    order_T = torch.randperm(211, device=device)
    plain = route(logits_TE, bias_E, 3, impl=impl)
    moved = route(logits_TE[order_T].contiguous(), bias_E, 3, impl=impl)
    assert torch.equal(moved.experts_TK, plain.experts_TK[order_T])
    assert_near(moved.weights_TK, plain.weights_TK[order_T])
    for name in ("load_E", "ends_E", "tile_expert_M", "tile_row_M"):
        assert torch.equal(getattr(moved, name), getattr(plain, name))
    owner_R = torch.searchsorted(moved.ends_E, torch.arange(633, device=device), right=True)
    for expert in range(16):
        tokens = moved.tokens_R[owner_R == expert]
        assert torch.equal(tokens, tokens.sort().values)


@pytest.mark.parametrize("impl", FORMS)
def test_the_same_inputs_give_the_same_bits(impl: Impl, device: torch.device) -> None:
    logits_TE, bias_E = torch.randn(130, 16, device=device), torch.zeros(16, device=device)
    one, other = (route_and_balance(logits_TE, bias_E, 2, 1e-3, impl=impl) for _ in range(2))
    for name in Routing._fields[:-1]:
        assert torch.equal(getattr(one[0], name), getattr(other[0], name)), name
    assert torch.equal(one[1].bias_E, other[1].bias_E)
    assert torch.equal(one[1].violation_1, other[1].violation_1)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("num_valid", [None, 0, 97])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_balance_is_the_largest_load_and_the_step_of_the_bias(
    impl: Impl,
    num_valid: int | None,
    groups: tuple[int, int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    logits_TE, bias_E = torch.randn(131, 16, device=device), torch.randn(16, device=device) * 0.1
    count = None
    if num_valid is not None:
        count = torch.tensor([num_valid], dtype=torch.int32, device=device)
    num_groups, chosen_groups = groups
    given = (logits_TE, bias_E, 2)
    routing, balance = route_and_balance(
        *given,
        0.01,
        num_groups=num_groups,
        chosen_groups=chosen_groups,
        num_valid=count,
        impl=impl,
    )
    plain = route(
        *given, num_groups=num_groups, chosen_groups=chosen_groups, num_valid=count, impl=impl
    )
    for name in Routing._fields[:-1]:
        assert torch.equal(getattr(routing, name), getattr(plain, name)), name
    loads = routing.load_E.tolist()
    mean = sum(loads) / 16
    assert_near(balance.violation_1.cpu(), torch.tensor([max(loads) / mean - 1 if mean else 0.0]))
    steps = [0.01 * ((load < mean) - (load > mean)) for load in loads]
    moved = [b + step for b, step in zip(bias_E.tolist(), steps, strict=True)]
    expected = torch.tensor(moved) - sum(moved) / 16
    assert_near(balance.bias_E.cpu(), expected)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "width", "num_experts", "num_chosen", "groups"),
    [(0, 8, 4, 2, (1, 1)), (1, 24, 1, 1, (1, 1)), (97, 40, 16, 2, (1, 1)), (83, 24, 6, 2, (3, 2))],
)
def test_tokens_are_routed_by_their_product_with_the_router(
    impl: Impl,
    dtype: torch.dtype,
    num_tokens: int,
    width: int,
    num_experts: int,
    num_chosen: int,
    groups: tuple[int, int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    x_TD = torch.randn(num_tokens, width, device=device).mul(4).round().div(4).to(dtype)
    router_ED = torch.randn(num_experts, width, device=device).mul(64).round() / 64
    router_ED = router_ED / 2  # products and sums of few bits are exact in any order
    bias_E = torch.randn(num_experts, device=device) * 0.1
    logits_TE = (x_TD.double() @ router_ED.double().T).float()
    num_groups, chosen_groups = groups
    choose = partial(route, num_groups=num_groups, chosen_groups=chosen_groups)
    want = choose(logits_TE, bias_E, num_chosen, impl="reference")
    choose_for = partial(route_tokens, num_groups=num_groups, chosen_groups=chosen_groups)
    got = choose_for(x_TD, router_ED, bias_E, num_chosen, impl=impl)
    assert_same(got, want, assert_near)


def test_a_router_that_no_program_can_hold_takes_a_product_of_its_own(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, assert_near: NearCheck
) -> None:
    monkeypatch.setattr("kernels.routing.FUSED_BYTES", 0)
    x_TD, router_ED = torch.randn(33, 16, device=device), torch.randn(8, 16, device=device)
    bias_E = torch.zeros(8, device=device)
    want = route(functional.linear(x_TD, router_ED), bias_E, 2, impl="reference")
    assert_same(route_tokens(x_TD, router_ED, bias_E, 2, impl="triton"), want, assert_near)


def test_gradients_reach_tokens_and_router() -> None:
    x_TD = torch.randn(5, 6, requires_grad=True)
    router_ED = torch.randn(4, 6, requires_grad=True)
    routing = route_tokens(x_TD, router_ED, torch.zeros(4), 2)
    plain = route(functional.linear(x_TD, router_ED), torch.zeros(4), 2)
    assert torch.equal(routing.weights_TK, plain.weights_TK)  # the bits of two calls
    grads = [
        torch.autograd.grad(weights_TK[:, 0].sum(), (x_TD, router_ED))
        for weights_TK in (routing.weights_TK, plain.weights_TK)
    ]
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)
        assert got.any()


def test_a_router_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="router_ED: expected"):
        route_tokens(torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(2), 1)
