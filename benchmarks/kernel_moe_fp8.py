"""The layer of routed experts in 8 bits, from quantised tokens to tokens.

Legend: T tokens, D model, F expert hidden, E experts, K chosen, S runs of 128 columns.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_moe import CHECKED_TOKENS, QWEN3, ROUTINGS, MoEShape, draw_moe, exact_rows
from benchmarks.kernel_moe_inputs import MoEInputs
from benchmarks.kernel_op import OURS, Call, Case, Op, Peer, spread_rows
from benchmarks.kernel_roofline import Work, moe_work
from kernels.dispatch import Impl
from kernels.fused_moe import fused_moe
from kernels.fused_moe_fp8 import (
    E4M3,
    RUN,
    Float8Experts,
    fused_moe_fp8,
    quantize_experts,
    quantize_rows,
)
from kernels.moe_config import MoESize, moe_launch
from kernels.routing import Routing, route

TINY = MoEShape("tiny", 4, 2, 256, 128)
FP8_SIZES = {QWEN3: (64, 256, 16384)}


class Float8Inputs(NamedTuple):
    """Quantised tokens and weights, and those before.

    Args:
        x: Tokens, float8_e4m3fn [T, D].
        x_scale: Of each run of 128 columns, float32 [T, S].
        experts: Weights.
        routing: Weights, order and tiles.
        wide: The same tokens and weights, not quantised.
    """

    x: Tensor
    x_scale: Tensor
    experts: Float8Experts
    routing: Routing
    wide: MoEInputs


def draw_moe_fp8(
    shape: MoEShape, num_tokens: int, name: str, dtype: torch.dtype, generator: torch.Generator
) -> Float8Inputs:
    """Return quantised tokens, weights and their routing."""
    wide = draw_moe(shape, num_tokens, name, dtype, generator)
    size = MoESize(shape.num_experts, shape.num_chosen, shape.width, shape.hidden, E4M3)
    block_rows = moe_launch(size, num_tokens).block_rows
    bias_E = wide.logits.new_zeros(shape.num_experts)
    routing = route(wide.logits, bias_E, shape.num_chosen, block_rows=block_rows)
    experts = quantize_experts(wide.gate_up, wide.down)
    return Float8Inputs(*quantize_rows(wide.x), experts, routing, wide._replace(routing=routing))


def _cases(device: str) -> Sequence[Case[Float8Inputs]]:
    is_cpu = device == "cpu"
    sizes = {TINY: (12,)} if is_cpu else FP8_SIZES
    dtype = torch.float32 if is_cpu else torch.bfloat16
    return [
        Case(shape.name, size, routing, dtype, partial(draw_moe_fp8, shape, size, routing, dtype))
        for shape in sizes
        for size in sizes[shape]
        for routing in ROUTINGS
    ]


def _work(inputs: Float8Inputs) -> Work:
    """8 bits in and between, the scales beside them, 16 bits out."""
    (num_tokens, d), f = inputs.x.shape, inputs.experts.down_EDF.shape[2]
    num_active = int((inputs.routing.load_E > 0).sum())
    work = moe_work(num_tokens, inputs.routing.tokens_R.numel(), num_active, (d, f), E4M3)
    scales = 4 * (num_active * 3 * d * f // RUN**2 + num_tokens * d // RUN)
    return work._replace(num_bytes=work.num_bytes + num_tokens * d + scales)


def _exact(inputs: Float8Inputs) -> tuple[Tensor, Tensor]:
    """Return what the weights before would give: the error is that of the quantisation too."""
    token_N = spread_rows(len(inputs.x), CHECKED_TOKENS, inputs.x.device)
    expert_NK = inputs.routing.experts_TK[token_N]
    x_ND = inputs.wide.x[token_N].repeat_interleave(expert_NK.shape[1], dim=0)
    y_NKD = exact_rows(inputs.wide, x_ND, expert_NK.flatten()).unflatten(0, expert_NK.shape)
    weights_NK1 = inputs.routing.weights_TK[token_N].double().unsqueeze(-1)
    return token_N, (weights_NK1 * y_NKD).sum(dim=1)


def _run(impl: Impl, inputs: Float8Inputs) -> Call:
    given = (inputs.x, inputs.x_scale, inputs.experts, inputs.routing)
    return lambda: fused_moe_fp8(*given, dtype=inputs.wide.x.dtype, impl=impl)


def _run_wide(inputs: Float8Inputs) -> Call:
    wide = inputs.wide
    return lambda: fused_moe(wide.x, wide.gate_up, wide.down, wide.routing)


MOE_FP8: Op[Float8Inputs] = Op(
    "moe_fp8",
    _cases,
    [
        Peer(OURS, partial(_run, "auto")),
        Peer(f"{OURS} without fp8", _run_wide),
    ],
    _work,
    _exact,
)
