"""What is swept: the ops of ``kernel_sweep``, and the ways to cut their products.

Legend: T tokens, D model, F expert hidden, E experts, K chosen, R routed rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_moe import MOE, MOE_SIZES, MoEShape, draw_moe
from benchmarks.kernel_moe_fp8 import FP8_SIZES, MOE_FP8, Float8Inputs, draw_moe_fp8
from benchmarks.kernel_moe_inputs import MoEInputs
from benchmarks.kernel_op import Op
from kernels._triton import fused_moe, fused_moe_fp8, fused_moe_narrow
from kernels.fused_moe_fp8 import E4M3, RUN, quantize_rows
from kernels.moe_config import MoELaunch, MoESize
from kernels.routing import route

Given = MoEInputs | Float8Inputs
Pair = tuple[Tensor, Tensor]  # values and scales
Rows = Tensor | Pair
Cut = tuple[int, int, int, int, bool, int, bool]
Values = Cut | tuple[int, int, int, int, bool, int, bool, bool]  # of a ProductLaunch
# block_n (of gate and of up each), block_k, num_warps, num_stages, swap, group, persistent, halves
FEW: Sequence[Values] = (
    (32, 128, 4, 3, True, 1, False),
    (32, 128, 4, 5, True, 1, False),
    (32, 256, 4, 3, True, 1, False),
    (64, 64, 4, 4, True, 1, False),
    (64, 128, 4, 3, True, 1, False),
    (64, 128, 4, 4, True, 1, False),
    (64, 128, 8, 3, True, 1, False),
    (128, 64, 8, 4, True, 1, False),
)
SOME: Sequence[Values] = (
    (32, 64, 4, 4, True, 2, False),
    (64, 64, 4, 3, True, 2, False),
    (64, 64, 4, 5, True, 2, False),
    (64, 128, 4, 3, True, 2, False),
    (128, 64, 8, 4, True, 2, False),
    (64, 64, 4, 4, False, 2, False),
    (128, 64, 4, 4, False, 2, False),
    (128, 64, 8, 4, False, 2, False),
)
MANY: Sequence[Values] = (
    (128, 64, 8, 4, False, 8, False),
    (128, 64, 8, 4, False, 8, False, True),
    (128, 64, 8, 4, False, 4, False, True),
    (128, 64, 8, 4, False, 16, False, True),
    (128, 128, 8, 2, False, 8, False, True),
    (128, 64, 8, 3, False, 8, True),
    (128, 64, 8, 4, False, 8, True),
    (128, 64, 8, 4, False, 16, True),
    (128, 64, 8, 4, False, 4, True),
    (64, 64, 4, 3, False, 8, False),
)
RUNS_FEW: Sequence[Values] = (
    (RUN, RUN, 4, 2, True, 1, False),
    (RUN, RUN, 4, 3, True, 1, False),
    (RUN, RUN, 4, 4, True, 1, False),
    (RUN, RUN, 8, 3, True, 1, False),
)
RUNS_SOME: Sequence[Values] = (
    (RUN, RUN, 8, 4, True, 2, False),
    (RUN, RUN, 8, 4, False, 2, False),
    (RUN, RUN, 8, 3, False, 8, False),
)
RUNS_MANY: Sequence[Values] = tuple(  # ``fused_moe_fp8_wide``: the group alone is a choice
    (RUN, RUN, 8, 4, False, group, False) for group in (1, 4, 8, 16)
)


class Swept(NamedTuple):
    """An op whose products are swept.

    Args:
        op: As it is measured.
        sizes: Tokens of each layer.
        dtype: Of the weights.
        ways: What is tried, by rows of a tile.
        wider: Columns of a program of each product, in those of a way.
        down: What is not tried for down.
        draw: Returns inputs of a layer.
        wanted: Returns hidden rows and outputs in expert order, by torch.
        up: Runs the first product.
        rows: Runs the second on given hidden rows.
        whole: Runs the op.
        seen: Returns an output as float32.
        most_error: Of the norm.
        most_difference: Of the largest value, anywhere.
    """

    op: Op[Any]
    sizes: Mapping[MoEShape, Sequence[int]]
    dtype: torch.dtype
    ways: Mapping[int, Sequence[Values]]
    wider: Mapping[str, int]
    down: Mapping[str, Any]
    draw: Callable[..., Any]
    wanted: Callable[[Any], tuple[Any, Tensor]]
    up: Callable[[Any, MoELaunch], Any]
    rows: Callable[[Any, Any, MoELaunch], Tensor]
    whole: Callable[[Any, MoELaunch], Tensor]
    seen: Callable[[Any], Tensor]
    most_error: float
    most_difference: float


def with_tiles(inputs: Given, block_rows: int) -> Given:
    """Return the inputs with tiles of so many rows."""
    logits_TE = inputs.wide.logits if isinstance(inputs, Float8Inputs) else inputs.logits
    num_experts, num_chosen = logits_TE.shape[1], inputs.routing.experts_TK.shape[1]
    bias_E = logits_TE.new_zeros(num_experts)
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows)
    return inputs._replace(routing=routing)


def torch_rows(inputs: MoEInputs) -> tuple[Tensor, Tensor]:
    """Return hidden rows and outputs in expert order, expert by expert."""
    hidden, outputs = [], []
    rows_RD = inputs.x[inputs.routing.tokens_R]
    for expert, rows_ND in enumerate(rows_RD.split(inputs.routing.load_E.tolist())):
        gate_NF, up_NF = functional.linear(rows_ND, inputs.gate_up[expert]).chunk(2, dim=1)
        hidden.append(functional.silu(gate_NF) * up_NF)
        outputs.append(functional.linear(hidden[-1], inputs.down[expert]))
    return torch.cat(hidden), torch.cat(outputs)


def _quantized_rows(inputs: Float8Inputs) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the rows of the weights before; the hidden ones quantised."""
    hidden_RF, y_RD = torch_rows(inputs.wide)
    return quantize_rows(hidden_RF), y_RD


def _wide(rows: Rows) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.float()
    values, scale = rows
    wide: Tensor = values.float() * scale.repeat_interleave(RUN, dim=1)
    return wide


def _pairs(inputs: Float8Inputs) -> tuple[Pair, Pair, Pair]:
    experts = inputs.experts
    gate_up = (experts.gate_up_EGD, experts.gate_up_scale)
    return (inputs.x, inputs.x_scale), gate_up, (experts.down_EDF, experts.down_scale)


def _whole(given: MoEInputs, config: MoELaunch) -> Tensor:
    num_experts, width, hidden = given.down.shape
    num_chosen = given.routing.rows_TK.shape[1]
    size = MoESize(num_experts, num_chosen, width, hidden, given.down.dtype)
    form = fused_moe_narrow if size.is_narrow else fused_moe
    out_TD: Tensor = form.launch(given.x, given.gate_up, given.down, given.routing, config)
    return out_TD


SWEPT = {
    "moe": Swept(
        op=MOE,
        sizes=MOE_SIZES,
        dtype=torch.bfloat16,
        ways={16: FEW, 32: FEW, 64: SOME, 128: MANY},
        wider={"up": 1, "down": 2},
        down={"halves": False},
        draw=draw_moe,
        wanted=torch_rows,
        up=lambda given, config: fused_moe.launch_up(given.x, given.gate_up, given.routing, config),
        rows=lambda given, h_RF, config: fused_moe.launch_down(
            h_RF, given.down, given.routing, config
        ),
        whole=_whole,
        seen=_wide,
        most_error=0.01,  # rounding to bfloat16 alone is .002
        most_difference=0.05,
    ),
    "moe_fp8": Swept(
        op=MOE_FP8,
        sizes=FP8_SIZES,
        dtype=E4M3,
        ways={16: RUNS_FEW, 32: RUNS_FEW, 64: RUNS_SOME, 128: RUNS_MANY},
        wider={"up": 1, "down": 1},
        down={},
        draw=draw_moe_fp8,
        wanted=_quantized_rows,
        up=lambda given, config: fused_moe_fp8.launch_up(
            _pairs(given)[0], _pairs(given)[1], given.routing, config
        ),
        rows=lambda given, hidden, config: fused_moe_fp8.launch_down(
            hidden, _pairs(given)[2], given.routing, config, torch.bfloat16
        ),
        whole=lambda given, config: fused_moe_fp8.launch(
            *_pairs(given), given.routing, config, torch.bfloat16
        ),
        seen=_wide,
        most_error=0.1,  # of quantised weights and rows beside those before
        most_difference=0.1,
    ),
}
