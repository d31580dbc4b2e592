"""``fused_moe`` with 8-bit weights and rows: float8_e4m3fn values, float32 scales.

Weights have a scale per block of 128 x 128, rows one per run of 128 columns; hidden rows are
quantised anew between both products.  Tokens come quantised, as ``add_rmsnorm_fp8`` gives them.

Covered: SwiGLU experts whose widths are multiples of 128.  Not covered: gradients.

Legend: T tokens, R routed rows, D model, F expert hidden, E experts, K chosen, G = 2 F,
S runs of 128 columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import Impl, check, select_impl
from kernels.moe_config import MoESize, moe_launch
from kernels.routing import Routing

RUN = 128  # columns, and rows of a weight, that share a scale
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # largest number of float8_e4m3fn
OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)


class Float8Experts(NamedTuple):
    """Quantised weights of a layer.

    Args:
        gate_up_EGD: First F rows gate, last F rows up, float8_e4m3fn.
        gate_up_scale: Of each block of it, float32 [E, G / 128, D / 128].
        down_EDF: float8_e4m3fn.
        down_scale: Of each block of it, float32 [E, D / 128, F / 128].
    """

    gate_up_EGD: Tensor
    gate_up_scale: Tensor
    down_EDF: Tensor
    down_scale: Tensor


def quantize_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in 8 bits and the scale of each run of 128 columns, float32 [N, S].

        scale = max |x| / 448 of a run (1 if all are 0)        quantised = x / scale

    Raises:
        ValueError: The width is not a multiple of 128.
    """
    _demand_runs("x_ND", x_ND, 1)
    run_NSC = x_ND.float().unflatten(1, (-1, RUN))
    step_NS1 = _step(run_NSC.abs().amax(dim=2, keepdim=True))
    return _rounded(run_NSC / step_NS1).flatten(1), step_NS1.squeeze(2)


def quantize_blocks(weight_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights in 8 bits and the scale of each 128 x 128, float32 [E, N / 128, K / 128].

    Raises:
        ValueError: A width is not a multiple of 128.
    """
    _demand_runs("weight_ENK", weight_ENK, 1)
    _demand_runs("weight_ENK", weight_ENK, 2)
    blocks = weight_ENK.float().unflatten(2, (-1, RUN)).unflatten(1, (-1, RUN))
    step = _step(blocks.abs().amax(dim=(2, 4), keepdim=True))
    values_ENK = _rounded(blocks / step).flatten(3).flatten(1, 2)
    return values_ENK, step.squeeze(4).squeeze(2)


def quantize_experts(gate_up_EGD: Tensor, down_EDF: Tensor) -> Float8Experts:
    """Return the weights of ``fused_moe`` in 8 bits."""
    return Float8Experts(*quantize_blocks(gate_up_EGD), *quantize_blocks(down_EDF))


def fused_moe_fp8(
    x_TD: Tensor,
    x_scale_TS: Tensor,
    experts: Float8Experts,
    routing: Routing,
    *,
    dtype: torch.dtype = torch.bfloat16,
    impl: Impl = "auto",
) -> Tensor:
    """Return what ``fused_moe`` returns, from quantised tokens and weights.

    Args:
        x_TD: Tokens, float8_e4m3fn, contiguous.
        x_scale_TS: Scale of each run of 128 columns, float32, contiguous.
        experts: Quantised weights.
        routing: What ``route`` returned.
        dtype: Of the result: float16, bfloat16 or float32.
        impl: Form to run; the torch form is the reference.

    Returns:
        [T, D].  Products are accumulated in float32 after each 128 inner columns; hidden rows are
        quantised in runs of 128, and each expert's output is rounded to ``dtype`` (not in the
        reference).  A run with the same inputs gives the same bits.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Source:
        DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
    """
    num_experts, width, hidden = experts.down_EDF.shape
    num_tokens, num_chosen = routing.rows_TK.shape
    for axis in (1, 2):
        _demand_runs("experts.down_EDF", experts.down_EDF, axis)
    check("x_TD", x_TD, (num_tokens, width), E4M3)
    check("x_scale_TS", x_scale_TS, (num_tokens, width // RUN), torch.float32)
    check("experts.gate_up_EGD", experts.gate_up_EGD, (num_experts, 2 * hidden, width), E4M3)
    check("experts.down_EDF", experts.down_EDF, (num_experts, width, hidden), E4M3)
    up_scales, down_scales = (2 * hidden // RUN, width // RUN), (width // RUN, hidden // RUN)
    scales = (experts.gate_up_scale, experts.down_scale)
    check("experts.gate_up_scale", scales[0], (num_experts, *up_scales), torch.float32)
    check("experts.down_scale", scales[1], (num_experts, *down_scales), torch.float32)
    if dtype not in OUTPUTS:
        message = f"dtype: expected one of {OUTPUTS}, got {dtype}"
        raise ValueError(message)
    if select_impl(impl, x_scale_TS, *scales) == "triton":
        from kernels._triton.fused_moe_fp8 import launch  # noqa: PLC0415 - Triton is optional

        size = MoESize(num_experts, num_chosen, width, hidden, E4M3)
        config = moe_launch(size, num_tokens, routing.block_rows)
        weights = ((experts.gate_up_EGD, scales[0]), (experts.down_EDF, scales[1]))
        return launch((x_TD, x_scale_TS), *weights, routing, config, dtype)
    return fused_moe_fp8_reference(x_TD, x_scale_TS, experts, routing, dtype)


def fused_moe_fp8_reference(
    x_TD: Tensor, x_scale_TS: Tensor, experts: Float8Experts, routing: Routing, dtype: torch.dtype
) -> Tensor:
    """The formula, expert by expert, on values times scales."""
    loads = routing.load_E.tolist()
    rows_RD = _wide_rows(x_TD, x_scale_TS)[routing.tokens_R]
    pieces = []
    for expert, rows_ND in enumerate(rows_RD[: sum(loads)].split(loads)):
        gate_up_GD = _wide_blocks(experts.gate_up_EGD[expert], experts.gate_up_scale[expert])
        gate_NF, up_NF = (rows_ND @ gate_up_GD.T).chunk(2, dim=1)
        hidden_NF = _wide_rows(*quantize_rows(functional.silu(gate_NF) * up_NF))
        down_DF = _wide_blocks(experts.down_EDF[expert], experts.down_scale[expert])
        pieces.append(hidden_NF @ down_DF.T)
    y_RD = torch.cat([*pieces, rows_RD[sum(loads) :]])
    out_TD: Tensor = (routing.weights_TK.unsqueeze(-1) * y_RD[routing.rows_TK]).sum(dim=1)
    return out_TD.to(dtype)


def _demand_runs(name: str, tensor: Tensor, axis: int) -> None:
    if tensor.shape[axis] % RUN:
        message = f"{name}: expected multiples of {RUN}, got {list(tensor.shape)}"
        raise ValueError(message)


def _step(most: Tensor) -> Tensor:
    return torch.where(most > 0.0, most / E4M3_MAX, 1.0)


def _rounded(values: Tensor) -> Tensor:
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _wide_rows(x_ND: Tensor, scale_NS: Tensor) -> Tensor:
    run_NSC: Tensor = x_ND.float().unflatten(1, (-1, RUN)) * scale_NS.unsqueeze(2)
    return run_NSC.flatten(1)


def _wide_blocks(weight_NK: Tensor, scale: Tensor) -> Tensor:
    scale_NK = scale.repeat_interleave(RUN, dim=0).repeat_interleave(RUN, dim=1)
    wide_NK: Tensor = weight_NK.float() * scale_NK
    return wide_NK
