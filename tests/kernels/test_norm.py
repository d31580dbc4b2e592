import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Form, Impl
from kernels.norm import E4M3_MAX, add_rmsnorm, add_rmsnorm_fp8, add_rmsnorm_reference

EPS = 1e-6
CAST_WRONG = 0.05  # most numbers that Triton's interpreter casts to 8 bits wrongly: what rounds up
# to a power of two loses the carry, and what is subnormal becomes 0
NearCheck = Callable[[Tensor, Tensor], None]


def naive(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor) -> list[list[float]]:
    rows = (x_TD if residual_TD is None else x_TD + residual_TD).tolist()
    gains = weight_D.tolist()
    scale = [1.0 / math.sqrt(sum(v * v for v in row) / len(row) + EPS) for row in rows]
    return [
        [v * s * g for v, g in zip(row, gains, strict=True)]
        for row, s in zip(rows, scale, strict=True)
    ]


@pytest.mark.parametrize("with_residual", [False, True])
def test_reference_is_the_formula(with_residual: bool, assert_near: NearCheck) -> None:
    x_TD, weight_D = torch.randn(7, 11).double(), torch.randn(11).double()
    residual_TD = torch.randn(7, 11).double() if with_residual else None
    expected_TD = torch.tensor(naive(x_TD, residual_TD, weight_D), dtype=torch.float64)
    normed_TD, summed_TD = add_rmsnorm_reference(x_TD, residual_TD, weight_D, EPS)
    assert_near(normed_TD, expected_TD)
    assert_near(summed_TD, x_TD if residual_TD is None else x_TD + residual_TD)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (13, 24), (17, 128), (3, 4096), (2, 8192)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_forms_agree(
    impl: Impl,
    dtype: torch.dtype,
    shape: tuple[int, int],
    with_residual: bool,
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    x_TD = torch.randn(shape, device=device).to(dtype)
    residual_TD = torch.randn(shape, device=device).to(dtype) if with_residual else None
    weight_D = torch.randn(shape[1], device=device).to(dtype)
    expected = add_rmsnorm(x_TD, residual_TD, weight_D, EPS, impl="reference")
    for got, want in zip(
        add_rmsnorm(x_TD, residual_TD, weight_D, EPS, impl=impl), expected, strict=True
    ):
        assert got.dtype == dtype
        assert_near(got, want)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_nan_row_stays_alone(impl: Impl, device: torch.device) -> None:
    x_TD = torch.randn(9, 16, device=device)
    x_TD[4] = torch.nan
    normed_TD, _ = add_rmsnorm(x_TD, x_TD, torch.ones(16, device=device), EPS, impl=impl)
    assert normed_TD.isnan().any(dim=1).nonzero().flatten().tolist() == [4]


def test_gradients_agree(assert_near: NearCheck) -> None:
    x_TD, residual_TD, weight_D = leaves = [
        torch.randn(shape, requires_grad=True) for shape in ((6, 8), (6, 8), (8,))
    ]
    grads = []
    for impl in get_args(Form)[:2]:
        normed_TD, summed_TD = add_rmsnorm(x_TD, residual_TD, weight_D, EPS, impl=impl)
        loss = normed_TD.square().sum() + summed_TD.sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert_near(got, want)


def test_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="residual_TD: expected"):
        add_rmsnorm(torch.zeros(2, 4), torch.zeros(3, 4), torch.ones(4), EPS)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (13, 384), (3, 4096)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_quantised_norm_is_within_half_a_step(
    impl: Impl,
    shape: tuple[int, int],
    with_residual: bool,
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    x_TD, weight_D = torch.randn(shape, device=device), torch.randn(shape[1], device=device)
    x_TD[: shape[0] // 2, :128] = 0.0  # runs without a number
    residual_TD = x_TD * 3.0 if with_residual else None
    normed_TD, summed_TD = add_rmsnorm(x_TD, residual_TD, weight_D, EPS, impl="reference")
    got_TD, scale_TS, got_summed_TD = add_rmsnorm_fp8(x_TD, residual_TD, weight_D, EPS, impl=impl)
    assert got_TD.dtype == torch.float8_e4m3fn
    assert torch.equal(got_summed_TD, summed_TD)
    most_TS = normed_TD.unflatten(1, (-1, 128)).abs().amax(dim=2)
    assert_near(scale_TS, torch.where(most_TS > 0, most_TS / E4M3_MAX, 1.0))
    exact_TD = normed_TD / scale_TS.repeat_interleave(128, dim=1)
    half_step_TD = (exact_TD.abs() / 16).clamp(min=2**-10)  # 3 bits of fraction, least step 2^-9
    is_near_TD = (got_TD.float() - exact_TD).abs() <= half_step_TD * 1.001
    if impl == "triton" and device.type == "cpu":
        assert (~is_near_TD).sum() <= CAST_WRONG * is_near_TD.numel()
    else:
        assert is_near_TD.all()


def test_quantised_columns_come_in_whole_runs() -> None:
    with pytest.raises(ValueError, match="multiple of 128 columns, got 96"):
        add_rmsnorm_fp8(torch.zeros(2, 96), None, torch.ones(96), EPS)
