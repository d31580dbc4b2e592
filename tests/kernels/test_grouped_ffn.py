import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Form, Impl
from kernels.grouped_ffn import grouped_ffn
from kernels.permute import combine, permute
from kernels.routing import Routing, route

NearCheck = Callable[[Tensor, Tensor], None]
FORMS = get_args(Form)


def draw(
    num_tokens: int, sizes: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Routing]:
    """Return rows, weights and routing; sizes = D, F, E, K."""
    width, hidden, num_experts, num_chosen = sizes
    logits_TE = torch.randn(num_tokens, num_experts, device=device)
    bias_E = torch.zeros(num_experts, device=device)
    routing = route(logits_TE, bias_E, num_chosen, block_rows=16, impl="reference")
    x_TD = torch.randn(num_tokens, width, device=device).to(dtype)
    gate_up = torch.randn(num_experts, 2 * hidden, width, device=device) * width**-0.5
    down = torch.randn(num_experts, width, hidden, device=device) * hidden**-0.5
    rows_RD = permute(x_TD, routing.tokens_R, impl="reference")
    return rows_RD, gate_up.to(dtype), down.to(dtype), routing


def test_reference_is_the_formula(assert_near: NearCheck) -> None:
    x, gate_up, down, routing = draw(5, (3, 2, 4, 2), torch.device("cpu"), torch.float64)
    owners = torch.repeat_interleave(torch.arange(4), routing.load_E).tolist()
    expected = torch.zeros_like(x)
    for r, e in enumerate(owners):
        for f in range(2):
            gate = sum(float(gate_up[e, f, d] * x[r, d]) for d in range(3))
            up = sum(float(gate_up[e, 2 + f, d] * x[r, d]) for d in range(3))
            hidden = gate / (1.0 + math.exp(-gate)) * up
            expected[r] += down[e, :, f] * hidden
    assert_near(grouped_ffn(x, gate_up, down, routing, impl="reference"), expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "sizes"),
    [
        (0, (16, 8, 3, 1)),
        (1, (24, 20, 8, 2)),  # most experts empty
        (37, (24, 20, 5, 2)),  # nothing divides a tile
        (19, (16, 80, 3, 3)),  # K = E, two column blocks
        (23, (80, 16, 1, 1)),  # two inner blocks
    ],
)
def test_forms_agree(
    impl: Impl,
    dtype: torch.dtype,
    num_tokens: int,
    sizes: tuple[int, int, int, int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    inputs = draw(num_tokens, sizes, device, dtype)
    got = grouped_ffn(*inputs, impl=impl)
    assert got.dtype == dtype
    assert_near(got, grouped_ffn(*inputs, impl="reference"))


@pytest.mark.parametrize("impl", FORMS)
def test_all_rows_of_one_expert(impl: Impl, device: torch.device, assert_near: NearCheck) -> None:
    x_RD, gate_up, down, _ = draw(33, (16, 16, 4, 1), device, torch.float32)
    logits_TE = torch.zeros(33, 4, device=device)
    bias_E = torch.tensor([0.0, 0.0, 1.0, 0.0], device=device)
    routing = route(logits_TE, bias_E, 1, block_rows=16, impl=impl)
    gate_RF, up_RF = (x_RD @ gate_up[2].T).chunk(2, dim=1)
    expected_RD = (torch.nn.functional.silu(gate_RF) * up_RF) @ down[2].T
    assert_near(grouped_ffn(x_RD, gate_up, down, routing, impl=impl), expected_RD)


@pytest.mark.parametrize("impl", FORMS)
def test_nan_row_stays_alone(impl: Impl, device: torch.device) -> None:
    x_RD, gate_up, down, routing = draw(20, (16, 16, 3, 2), device, torch.float32)
    x_RD[11] = torch.nan
    y_RD = grouped_ffn(x_RD, gate_up, down, routing, impl=impl)
    assert y_RD.isnan().any(dim=1).nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("impl", FORMS)
def test_layer_does_not_depend_on_the_order_of_tokens(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    _, gate_up, down, _ = draw(1, (16, 12, 4, 2), device, torch.float32)
    x_TD, logits_TE = torch.randn(21, 16, device=device), torch.randn(21, 4, device=device)

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        routing = route(logits, torch.zeros(4, device=device), 2, block_rows=16, impl=impl)
        rows_RD = permute(x, routing.tokens_R, impl=impl)
        y_RD = grouped_ffn(rows_RD, gate_up, down, routing, impl=impl)
        return combine(y_RD, routing.weights_TK, routing.rows_TK, impl=impl)

    order = torch.randperm(21, device=device)
    assert_near(layer(x_TD[order], logits_TE[order]), layer(x_TD, logits_TE)[order])


def test_gradients_agree(assert_near: NearCheck) -> None:
    x_RD, gate_up, down, routing = draw(9, (6, 5, 7, 2), torch.device("cpu"), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x_RD, gate_up, down)]
    grads = []
    for impl in FORMS[:2]:
        loss = grouped_ffn(x_RD, gate_up, down, routing, impl=impl).square().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert_near(got, want)


def test_weights_of_another_dtype_are_refused() -> None:
    x_RD, gate_up, down, routing = draw(3, (4, 4, 2, 1), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="down_EDF: expected"):
        grouped_ffn(x_RD, gate_up, down.half(), routing)
