import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import Form, Impl
from kernels.swiglu import swiglu_ffn

NearCheck = Callable[[Tensor, Tensor], None]
FORMS = get_args(Form)
SHAPES = [(0, 8, 4), (1, 1, 1), (13, 24, 40), (67, 128, 192), (71, 130, 33), (130, 160, 80)]


def draw(
    num_tokens: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x_TD = torch.randn(num_tokens, width, device=device)
    gate_up_GD = torch.randn(2 * hidden, width, device=device) * width**-0.5
    down_DF = torch.randn(width, hidden, device=device) * hidden**-0.5
    return x_TD.to(dtype), gate_up_GD.to(dtype), down_DF.to(dtype)


def test_reference_is_the_formula(assert_near: NearCheck) -> None:
    x_TD, gate_up_GD, down_DF = draw(3, 4, 2, torch.float64, torch.device("cpu"))
    rows = []
    for x_D in x_TD.tolist():
        both = [sum(w * x for w, x in zip(row, x_D, strict=True)) for row in gate_up_GD.tolist()]
        hidden = [g / (1.0 + math.exp(-g)) * u for g, u in zip(both[:2], both[2:], strict=True)]
        rows.append(
            [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in down_DF.tolist()]
        )
    got_TD = swiglu_ffn(x_TD, gate_up_GD, down_DF, impl="reference")
    assert_near(got_TD, torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forms_agree(
    impl: Impl,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    given = draw(*shape, dtype, device)
    got_TD = swiglu_ffn(*given, impl=impl)
    assert got_TD.dtype == dtype
    assert_near(got_TD, swiglu_ffn(*given, impl="reference"))


def test_the_torch_form_has_the_bits_of_its_parts() -> None:
    x_TD, gate_up_GD, down_DF = draw(9, 16, 8, torch.float32, torch.device("cpu"))
    gate_TF, up_TF = functional.linear(x_TD, gate_up_GD).chunk(2, dim=-1)
    want_TD = functional.linear(functional.silu(gate_TF) * up_TF, down_DF)
    assert torch.equal(swiglu_ffn(x_TD, gate_up_GD, down_DF), want_TD)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("width", [32, 160])
def test_a_nan_token_stays_alone(impl: Impl, width: int, device: torch.device) -> None:
    x_TD, gate_up_GD, down_DF = draw(70, width, 24, torch.float32, device)
    x_TD[5] = torch.nan
    got_TD = swiglu_ffn(x_TD, gate_up_GD, down_DF, impl=impl)
    assert got_TD.isnan().any(dim=1).nonzero().flatten().tolist() == [5]


def test_gradients_agree(assert_near: NearCheck) -> None:
    leaves = [each.requires_grad_() for each in draw(6, 8, 4, torch.float64, torch.device("cpu"))]
    grads = [
        torch.autograd.grad(swiglu_ffn(*leaves, impl=impl).square().sum(), leaves)
        for impl in ("torch", "reference")
    ]
    for got, want in zip(*grads, strict=True):
        assert_near(got, want)


def test_weights_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="gate_up_GD: expected"):
        swiglu_ffn(torch.zeros(2, 4), torch.zeros(6, 4), torch.zeros(4, 2))
