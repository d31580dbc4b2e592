from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels._triton.fused_moe_fp8 import launch_down, launch_up
from kernels.dispatch import Form, Impl
from kernels.fused_moe import fused_moe
from kernels.fused_moe_fp8 import (
    E4M3,
    E4M3_MAX,
    Float8Experts,
    fused_moe_fp8,
    quantize_blocks,
    quantize_experts,
    quantize_rows,
)
from kernels.moe_config import MoESize, moe_launch
from kernels.routing import Routing, route

NearCheck = Callable[[Tensor, Tensor], None]
FORMS = get_args(Form)
QUANTISED = 0.08  # error over the norm: three roundings to 3 bits, 1 / 28 each on average

Inputs = tuple[Tensor, Tensor, Float8Experts, Routing]


def draw(
    num_tokens: int, sizes: tuple[int, int, int, int], device: torch.device, block_rows: int = 16
) -> tuple[Inputs, tuple[Tensor, Tensor, Tensor]]:
    """Return quantised inputs and what they were; sizes = D, F, E, K."""
    width, hidden, num_experts, num_chosen = sizes
    logits_TE = torch.randn(num_tokens, num_experts, device=device)
    bias_E = torch.zeros(num_experts, device=device)
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows, impl="reference")
    x_TD = torch.randn(num_tokens, width, device=device)
    gate_up = torch.randn(num_experts, 2 * hidden, width, device=device) * width**-0.5
    down = torch.randn(num_experts, width, hidden, device=device) * hidden**-0.5
    experts = quantize_experts(gate_up, down)
    return (*quantize_rows(x_TD), experts, routing), (x_TD, gate_up, down)


def wide(scale: Tensor) -> Tensor:
    """Return the scale of each column."""
    return scale.repeat_interleave(128, dim=-1)


def test_rows_and_blocks_come_back_within_a_rounding() -> None:
    weight = torch.randn(2, 256, 384) * torch.logspace(-6, 6, 256).view(1, 256, 1)
    values, scale = quantize_blocks(weight)
    wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    error = (values.float() * wide - weight).abs()
    assert bool((error <= (weight.abs() / 16).maximum(wide * 2**-10)).all())
    assert values.float().abs().amax() == E4M3_MAX
    rows, steps = quantize_rows(weight[0])
    error = (rows.float() * steps.repeat_interleave(128, 1) - weight[0]).abs()
    assert bool((error <= weight[0].abs() / 16 + steps.repeat_interleave(128, 1) * 2**-10).all())


def test_zeros_have_a_scale_of_one() -> None:
    rows, steps = quantize_rows(torch.zeros(3, 128))
    assert not rows.float().any()
    assert bool((steps == 1.0).all())


@pytest.mark.parametrize(
    ("num_tokens", "sizes", "block_rows"),
    [
        (1, (128, 128, 4, 2), 16),
        (1, (128, 128, 4, 2), 64),
        (37, (256, 128, 3, 2), 16),  # two inner runs, two blocks of down
        (37, (256, 128, 3, 2), 128),
        (23, (384, 256, 2, 1), 64),  # an odd number of blocks of down
        (23, (384, 256, 2, 1), 128),
    ],
)
def test_each_product_agrees_with_the_formula(
    num_tokens: int,
    sizes: tuple[int, int, int, int],
    block_rows: int,
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    (x_TD, x_scale, experts, routing), _ = draw(num_tokens, sizes, device, block_rows)
    config = moe_launch(MoESize(sizes[2], sizes[3], *sizes[:2], E4M3), num_tokens, block_rows)
    gate_up = (experts.gate_up_EGD, experts.gate_up_scale)
    hidden = launch_up((x_TD, x_scale), gate_up, routing, config)
    y_RD = launch_down(
        hidden, (experts.down_EDF, experts.down_scale), routing, config, torch.float32
    )
    rows_RD = (x_TD.float() * wide(x_scale))[routing.tokens_R]
    owner_R = torch.repeat_interleave(torch.arange(sizes[2], device=device), routing.load_E)
    wide_up, wide_down = (
        weight.float() * wide(scale.repeat_interleave(128, dim=1))
        for weight, scale in (gate_up, (experts.down_EDF, experts.down_scale))
    )
    gate_RF, up_RF = torch.einsum("rd,rgd->rg", rows_RD, wide_up[owner_R]).chunk(2, dim=1)
    want_RF = torch.nn.functional.silu(gate_RF) * up_RF
    got_RF = hidden[0].float() * wide(hidden[1])
    assert_near(hidden[1], want_RF.unflatten(1, (-1, 128)).abs().amax(dim=2) / E4M3_MAX)
    assert bool(((got_RF - want_RF).abs() <= want_RF.abs() / 8 + wide(hidden[1]) / 64).all())
    assert_near(y_RD, torch.einsum("rf,rdf->rd", got_RF, wide_down[owner_R]))


@pytest.mark.parametrize("impl", FORMS)
def test_result_is_near_that_of_the_weights_before(impl: Impl, device: torch.device) -> None:
    inputs, (x_TD, gate_up, down) = draw(19, (256, 128, 4, 2), device)
    want = fused_moe(x_TD, gate_up, down, inputs[3], impl="reference")
    got = fused_moe_fp8(*inputs, dtype=torch.float32, impl=impl)
    assert 0 < (got - want).norm() <= QUANTISED * want.norm()


def test_no_tokens_give_none(device: torch.device) -> None:
    inputs, _ = draw(0, (128, 128, 3, 1), device)
    assert fused_moe_fp8(*inputs, impl="triton").shape == (0, 128)


def test_hidden_rows_of_almost_nothing_are_zeros(device: torch.device) -> None:
    (x_TD, x_scale, experts, routing), _ = draw(5, (128, 128, 2, 1), device)
    x_scale *= 1e-20  # their product is below the least float32 whose inverse is finite
    gate_up = (experts.gate_up_EGD, experts.gate_up_scale)
    size = MoESize(2, 1, 128, 128, E4M3)
    values, scale = launch_up((x_TD, x_scale), gate_up, routing, moe_launch(size, 5, 16))
    assert not values.float().any()
    assert bool((scale == 1.0).all())


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy, under the interpreter
@pytest.mark.parametrize("impl", FORMS)
def test_a_broken_token_stays_alone(impl: Impl, device: torch.device) -> None:
    (x_TD, x_scale, experts, routing), _ = draw(9, (128, 128, 3, 2), device)
    x_scale[4] = torch.nan
    out = fused_moe_fp8(x_TD, x_scale, experts, routing, dtype=torch.float32, impl=impl)
    assert out.isnan().any(dim=1).nonzero().flatten().tolist() == [4]


def test_widths_that_are_not_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="x_ND: expected multiples of 128"):
        quantize_rows(torch.zeros(2, 100))
    with pytest.raises(ValueError, match="weight_ENK: expected multiples of 128"):
        quantize_blocks(torch.zeros(1, 128, 64))
