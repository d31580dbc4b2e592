import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from kernels._triton import fused_moe_narrow, swiglu
from kernels._triton.fused_moe import launch
from kernels.dispatch import Form, Impl
from kernels.fused_moe import SharedExpert, add_shared, fused_moe, tile_rows
from kernels.fused_moe_fp8 import E4M3
from kernels.moe_config import MoELaunch, MoESize, ProductLaunch, rule
from kernels.routing import Routing, route
from kernels.swiglu import swiglu_ffn

NearCheck = Callable[[Tensor, Tensor], None]
Inputs = tuple[Tensor, Tensor, Tensor, Routing]
FORMS = get_args(Form)
ROUNDINGS = 4  # hidden row and output are rounded once more than in the reference


def draw(
    num_tokens: int,
    sizes: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    block_rows: int = 16,
) -> Inputs:
    """Return tokens, weights and routing; sizes = D, F, E, K."""
    width, hidden, num_experts, num_chosen = sizes
    logits_TE = torch.randn(num_tokens, num_experts, device=device)
    bias_E = torch.zeros(num_experts, device=device)
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows, impl="reference")
    x_TD = torch.randn(num_tokens, width, device=device).to(dtype)
    gate_up = torch.randn(num_experts, 2 * hidden, width, device=device) * width**-0.5
    down = torch.randn(num_experts, width, hidden, device=device) * hidden**-0.5
    return x_TD, gate_up.to(dtype), down.to(dtype), routing


def exact(inputs: Inputs) -> Tensor:
    """Return the formula in float64."""
    x, gate_up, down, routing = inputs
    wide = routing._replace(weights_TK=routing.weights_TK.double())
    return fused_moe(x.double(), gate_up.double(), down.double(), wide, impl="reference")


def test_reference_is_the_formula(assert_near: NearCheck) -> None:
    inputs = x, gate_up, down, routing = draw(5, (3, 2, 4, 2), torch.device("cpu"), torch.float64)
    expected = torch.zeros_like(x)
    for t in range(5):
        for k in range(2):
            e, w = int(routing.experts_TK[t, k]), float(routing.weights_TK[t, k])
            for f in range(2):
                gate = sum(float(gate_up[e, f, d] * x[t, d]) for d in range(3))
                up = sum(float(gate_up[e, 2 + f, d] * x[t, d]) for d in range(3))
                expected[t] += w * down[e, :, f] * (gate / (1.0 + math.exp(-gate)) * up)
    assert_near(fused_moe(*inputs, impl="reference"), expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block_rows", [16, 64, 128])
@pytest.mark.parametrize(
    ("num_tokens", "sizes"),
    [
        (0, (16, 8, 3, 1)),
        (1, (24, 20, 8, 2)),  # most experts empty; rows that TMA cannot read
        (37, (24, 20, 5, 2)),  # nothing divides a tile
        (19, (16, 80, 3, 3)),  # K = E, two column blocks
        (23, (80, 16, 1, 1)),  # two inner blocks
        (41, (136, 72, 7, 3)),  # TMA with tails in all dimensions
    ],
)
def test_forms_agree(
    impl: Impl,
    dtype: torch.dtype,
    block_rows: int,
    num_tokens: int,
    sizes: tuple[int, int, int, int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    inputs = draw(num_tokens, sizes, device, dtype, block_rows)
    got = fused_moe(*inputs, impl=impl)
    assert got.dtype == dtype
    assert_near(got, fused_moe(*inputs, impl="reference"))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("num_tokens", [5, 29])
def test_every_cut_gives_the_same(
    swap: bool, group: int, num_tokens: int, device: torch.device, assert_near: NearCheck
) -> None:
    sizes = (64, 48, 5, 2)
    inputs = draw(num_tokens, sizes, device, torch.float32)
    want = fused_moe(*inputs, impl="reference")
    for is_persistent in (False, True):
        cut = ProductLaunch(16, 32, 4, 3, swap, group, is_persistent)
        got = launch(*inputs, MoELaunch(16, cut, cut, chained=True))
        assert_near(got, want)


@pytest.mark.parametrize("block_rows", [16, 64, 128])
@pytest.mark.parametrize(
    ("num_tokens", "sizes"),
    [
        (0, (16, 8, 3, 1)),
        (1, (24, 20, 8, 2)),
        (37, (128, 192, 5, 2)),  # three parts, all full
        (23, (100, 136, 3, 3)),  # the last part is not full, nor is the width
    ],
)
def test_a_narrow_layer_is_the_same_in_two_launches(
    block_rows: int,
    num_tokens: int,
    sizes: tuple[int, int, int, int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    inputs = draw(num_tokens, sizes, device, torch.float16, block_rows)
    size = MoESize(sizes[2], sizes[3], *sizes[:2], torch.float16)
    assert size.is_narrow
    got = fused_moe_narrow.launch(*inputs, rule(size, num_tokens, block_rows))
    assert_near(got, exact(inputs).half())
    assert torch.equal(got, fused_moe(*inputs, impl="triton"))


def test_layers_are_narrow_whose_rows_a_program_holds() -> None:
    size = MoESize(16, 2, 128, 192, torch.bfloat16)
    assert size.is_narrow
    for other in ({"width": 256}, {"hidden": 512}, {"dtype": torch.float32}, {"dtype": E4M3}):
        assert not MoESize(**{**size._asdict(), **other}).is_narrow


@pytest.mark.parametrize("num_tokens", [5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_that_are_half_full_give_the_same(
    num_tokens: int, dtype: torch.dtype, device: torch.device, assert_near: NearCheck
) -> None:
    """To the bit on a GPU; interpreted, a product is NumPy's: bits depend on its rows."""
    inputs = draw(num_tokens, (64, 48, 3, 2), device, dtype, block_rows=32)
    load_E = inputs[3].load_E
    assert bool(((load_E % 32 <= 16) & (load_E > 0)).any())
    cut = ProductLaunch(16, 32, 4, 3, swap=False, group=2)
    want, got = (
        launch(*inputs, MoELaunch(32, replace(cut, halves=halves), cut)) for halves in (False, True)
    )
    assert_near(got, want)
    assert torch.equal(got, want) or not got.is_cuda


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_is_that_of_a_few_roundings(
    impl: Impl, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = draw(31, (48, 40, 5, 2), device, dtype)
    want = exact(inputs)
    error, least = (
        (fused_moe(*inputs, impl=form).double() - want).norm() for form in (impl, "reference")
    )
    assert 0 < error <= ROUNDINGS * least


@pytest.mark.parametrize("impl", FORMS)
def test_all_tokens_to_one_expert(impl: Impl, device: torch.device, assert_near: NearCheck) -> None:
    x_TD, gate_up, down, _ = draw(33, (16, 16, 4, 1), device, torch.float32)
    logits_TE = torch.zeros(33, 4, device=device)
    bias_E = torch.tensor([0.0, 0.0, 1.0, 0.0], device=device)
    routing = route(logits_TE, bias_E, 1, block_rows=16, impl=impl)
    gate_TF, up_TF = (x_TD @ gate_up[2].T).chunk(2, dim=1)
    expected_TD = (torch.nn.functional.silu(gate_TF) * up_TF) @ down[2].T
    assert_near(fused_moe(x_TD, gate_up, down, routing, impl=impl), expected_TD)


@pytest.mark.parametrize("impl", FORMS)
def test_a_broken_token_stays_alone(impl: Impl, device: torch.device) -> None:
    x_TD, gate_up, down, routing = draw(20, (16, 16, 3, 2), device, torch.float32)
    x_TD[11] = torch.nan
    out_TD = fused_moe(x_TD, gate_up, down, routing, impl=impl)
    assert out_TD.isnan().any(dim=1).nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("impl", FORMS)
def test_idle_tokens_give_nothing(impl: Impl, device: torch.device, assert_near: NearCheck) -> None:
    x_TD, gate_up, down, _ = draw(21, (16, 12, 4, 2), device, torch.float32)
    logits_TE, bias_E = torch.randn(21, 4, device=device), torch.zeros(4, device=device)
    num_valid = torch.tensor([13], dtype=torch.int32, device=device)
    routing = route(logits_TE, bias_E, 2, block_rows=16, num_valid=num_valid)
    alone = route(logits_TE[:13].contiguous(), bias_E, 2, block_rows=16)
    out_TD = fused_moe(x_TD, gate_up, down, routing, impl=impl)
    assert_near(out_TD[:13], fused_moe(x_TD[:13], gate_up, down, alone, impl=impl))


@pytest.mark.parametrize("impl", FORMS)
def test_result_does_not_depend_on_the_order_of_tokens(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    x_TD, gate_up, down, _ = draw(21, (16, 12, 4, 2), device, torch.float32)
    logits_TE = torch.randn(21, 4, device=device)

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        routing = route(logits, torch.zeros(4, device=device), 2, block_rows=16, impl=impl)
        return fused_moe(x, gate_up, down, routing, impl=impl)

    order = torch.randperm(21, device=device)
    assert_near(layer(x_TD[order], logits_TE[order]), layer(x_TD, logits_TE)[order])


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize(
    ("num_tokens", "sizes"),
    [(1, (6, 5, 7, 2)), (9, (6, 5, 7, 2)), (37, (72, 40, 3, 3)), (29, (16, 80, 4, 1))],
)
def test_gradients_agree(
    impl: Impl,
    block_rows: int,
    num_tokens: int,
    sizes: tuple[int, int, int, int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    x, gate_up, down, routing = draw(num_tokens, sizes, device, torch.float32, block_rows)
    scale = torch.randn_like(x)  # another gradient for each output
    weights = routing.weights_TK.clone()
    leaves = [tensor.requires_grad_() for tensor in (x, gate_up, down, weights)]
    grads = []
    for form in (impl, "reference"):
        out = fused_moe(x, gate_up, down, routing._replace(weights_TK=weights), impl=form)
        grads.append(torch.autograd.grad((out * scale).sum(), leaves))
    for got, want in zip(*grads, strict=True):
        norm = want.norm() / want.numel() ** 0.5 + 1e-30
        assert_near(got / norm, want / norm)


new_empty, empty = Tensor.new_empty, torch.empty


def empty_broken(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of NaN, so that what nobody writes is seen."""
    made: Tensor = empty(shape, dtype=dtype, device=device)
    return made.fill_(math.nan) if made.is_floating_point() else made


def new_broken(tensor: Tensor, *shape: int, **options: torch.dtype) -> Tensor:
    """Return a tensor of NaN, so that what nobody writes is seen."""
    made: Tensor = new_empty(tensor, shape, dtype=options.get("dtype"))
    return made.fill_(math.nan) if made.is_floating_point() else made


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_idle_tokens_have_no_gradient(
    impl: Impl, device: torch.device, assert_near: NearCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "new_empty", new_broken)
    x, gate_up, down, _ = draw(21, (16, 12, 4, 2), device, torch.float32)
    logits_TE, bias_E = torch.randn(21, 4, device=device), torch.zeros(4, device=device)
    for count in (0, 13):
        num_valid = torch.tensor([count], dtype=torch.int32, device=device)
        routing = route(logits_TE, bias_E, 2, block_rows=16, num_valid=num_valid)
        alone = route(logits_TE[:count].contiguous(), bias_E, 2, block_rows=16)
        leaves = [tensor.requires_grad_() for tensor in (x, gate_up, down)]
        got, want = (
            torch.autograd.grad(fused_moe(tokens, gate_up, down, order, impl=impl).sum(), leaves)
            for tokens, order in ((x, routing), (x[:count], alone))
        )
        for each, expected in zip(got, want, strict=True):
            assert_near(each, expected)


def draw_shared(x_TD: Tensor, hidden: int, scale: float = 0.7) -> SharedExpert:
    width = x_TD.shape[1]
    gate_up = torch.randn(2 * hidden, width, device=x_TD.device) * width**-0.5
    down = torch.randn(width, hidden, device=x_TD.device) * hidden**-0.5
    return SharedExpert(gate_up.to(x_TD.dtype), down.to(x_TD.dtype), scale)


BESIDE = [  # T, sizes, shared hidden
    (0, (16, 8, 3, 1), 8),
    (1, (24, 20, 8, 2), 33),  # most experts empty
    (37, (128, 192, 5, 2), 192),  # narrow both, rows of three parts
    (65, (100, 136, 2, 2), 130),  # two tiles of tokens, the last part is not full
    (23, (72, 272, 5, 2), 40),  # whole rows, the shared expert narrow
    (65, (136, 40, 3, 2), 40),  # wide both, two tiles of tokens and of columns
]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_tokens", "sizes", "hidden"), BESIDE)
def test_forms_agree_beside_a_shared_expert(
    impl: Impl,
    dtype: torch.dtype,
    num_tokens: int,
    sizes: tuple[int, int, int, int],
    hidden: int,
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    inputs = draw(num_tokens, sizes, device, dtype)
    shared = draw_shared(inputs[0], hidden)
    got = fused_moe(*inputs, shared, impl=impl)
    assert got.dtype == dtype
    assert_near(got, fused_moe(*inputs, shared, impl="reference"))


def test_the_shared_expert_is_added_to_the_scaled_sum(assert_near: NearCheck) -> None:
    inputs = draw(7, (6, 5, 4, 2), torch.device("cpu"), torch.float64)
    shared = draw_shared(inputs[0], 3, scale=2.5)
    got = fused_moe(*inputs, shared, impl="reference")
    routed = fused_moe(*inputs, impl="reference")
    assert_near(got, swiglu_ffn(inputs[0], *shared[:2], impl="reference") + 2.5 * routed)
    assert torch.equal(
        fused_moe(*inputs, shared), add_shared(inputs[0], fused_moe(*inputs), shared)
    )


def test_bfloat16_beside_a_shared_expert(assert_near: NearCheck) -> None:
    inputs = draw(41, (24, 20, 5, 2), torch.device("cpu"), torch.bfloat16)
    shared = draw_shared(inputs[0], 33)
    assert_near(fused_moe(*inputs, shared), fused_moe(*inputs, shared, impl="reference"))


def test_large_tiles_beside_a_shared_expert_give_the_same(
    device: torch.device, assert_near: NearCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = draw(131, (136, 24, 3, 1), device, torch.float16)
    shared = draw_shared(inputs[0], 72)
    for name in ("NUM_CORES", "MANY_TILES"):
        monkeypatch.setattr(swiglu, name, 1)
    got = fused_moe(*inputs, shared, impl="triton")
    assert_near(got, fused_moe(*inputs, shared, impl="reference"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")
@pytest.mark.parametrize(
    ("sizes", "alone", "beside"),
    [((128, 192, 3, 2), 2, 2), ((72, 272, 3, 2), 3, 3), ((136, 72, 3, 2), 3, 4)],
)
def test_beside_a_shared_expert_the_sum_is_no_launch(
    sizes: tuple[int, int, int, int], alone: int, beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = draw(3, sizes, torch.device("cpu"), torch.float16)
    launches: list[object] = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: launches.append(0))
    for shared, expected in ((None, alone), (draw_shared(inputs[0], 40), beside)):
        launches.clear()
        fused_moe(*inputs, shared, impl="triton")
        assert len(launches) == expected


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(("width", "hidden"), [(32, 40), (32, 272), (136, 24)])
@pytest.mark.parametrize("count", [0, 13])
def test_idle_tokens_are_given_the_shared_expert_alone(
    impl: Impl,
    width: int,
    hidden: int,
    count: int,
    device: torch.device,
    assert_near: NearCheck,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x_TD, gate_up, down, _ = draw(21, (width, hidden, 4, 2), device, torch.float16)
    shared = draw_shared(x_TD, 40)
    logits_TE, bias_E = torch.randn(21, 4, device=device), torch.zeros(4, device=device)
    num_valid = torch.tensor([count], dtype=torch.int32, device=device)
    routing = route(logits_TE, bias_E, 2, block_rows=16, num_valid=num_valid)
    alone = route(logits_TE[:count].contiguous(), bias_E, 2, block_rows=16)
    monkeypatch.setattr(torch, "empty", empty_broken)
    out_TD = fused_moe(x_TD, gate_up, down, routing, shared, impl=impl)
    want = fused_moe(x_TD[:count], gate_up, down, alone, shared, impl="reference")
    assert_near(out_TD[:count], want)
    assert_near(out_TD[count:], swiglu_ffn(x_TD[count:], *shared[:2], impl="reference"))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("width", [16, 136])
def test_a_broken_token_stays_alone_beside_a_shared_expert(
    impl: Impl, width: int, device: torch.device
) -> None:
    x_TD, gate_up, down, routing = draw(70, (width, 16, 3, 2), device, torch.float16)
    x_TD[11] = torch.nan
    out_TD = fused_moe(x_TD, gate_up, down, routing, draw_shared(x_TD, 24), impl=impl)
    assert out_TD.isnan().any(dim=1).nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_agree_beside_a_shared_expert(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    x, gate_up, down, routing = draw(19, (24, 12, 5, 2), device, torch.float32)
    shared, weights = draw_shared(x, 20), routing.weights_TK.clone()
    routing = routing._replace(weights_TK=weights)
    every = (x, gate_up, down, weights, shared.gate_up_GD, shared.down_DF)
    leaves = [tensor.requires_grad_() for tensor in every]
    weight_TD = torch.randn_like(x)
    got, want = (
        torch.autograd.grad(
            (fused_moe(x, gate_up, down, routing, shared, impl=form) * weight_TD).sum(), leaves
        )
        for form in (impl, "reference")
    )
    for each, expected in zip(got, want, strict=True):
        norm = expected.norm() / expected.numel() ** 0.5
        assert_near(each / norm, expected / norm)


def test_a_shared_expert_of_another_width_is_refused() -> None:
    inputs = draw(3, (4, 4, 2, 1), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"shared\.gate_up_GD: expected"):
        fused_moe(*inputs, SharedExpert(torch.zeros(6, 4), torch.zeros(4, 2), 1.0))


def test_weights_of_another_dtype_are_refused() -> None:
    x_TD, gate_up, down, routing = draw(3, (4, 4, 2, 1), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="down_EDF: expected"):
        fused_moe(x_TD, gate_up, down.half(), routing)


def test_tiles_follow_the_mean_load() -> None:
    down_EDF = torch.empty(8, 4, 4, device="meta")
    assert [tile_rows(tokens, 2, down_EDF) for tokens in (0, 1, 80, 10_000)] == [16, 16, 32, 128]
