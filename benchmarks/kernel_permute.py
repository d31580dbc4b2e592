"""Tokens into expert order, and experts' outputs back.

Legend: T tokens, D model, K chosen, R routed rows.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_moe import BASE, LARGE, QWEN3, ROUTINGS, TINY, MoEShape, draw_logits
from benchmarks.kernel_op import OURS, Call, Case, Op, Peer, compiled, demand_gpu, spread_rows
from benchmarks.kernel_roofline import Work, combine_work, permute_work
from kernels.dispatch import Impl
from kernels.permute import combine, permute
from kernels.routing import Routing, route

CHECKED_ROWS = 64
SIZES = {QWEN3: (256, 16384), LARGE: (1024,), BASE: (1024,)}


class RowInputs(NamedTuple):
    """Rows [N, D]: tokens for ``permute``, outputs of experts for ``combine``."""

    rows: Tensor
    routing: Routing


Draw = Callable[[MoEShape, int, str, torch.dtype, torch.Generator], RowInputs]


def _draw(
    per_choice: bool,
    shape: MoEShape,
    num_tokens: int,
    name: str,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> RowInputs:
    device = generator.device
    logits_TE = draw_logits(num_tokens, shape.num_experts, name, generator)
    bias_E = torch.zeros(shape.num_experts, device=device)
    num_rows = num_tokens * (shape.num_chosen if per_choice else 1)
    rows_ND = torch.randn(num_rows, shape.width, generator=generator, device=device, dtype=dtype)
    return RowInputs(rows_ND, route(logits_TE, bias_E, shape.num_chosen))


def _cases(draw: Draw, device: str) -> Sequence[Case[RowInputs]]:
    is_cpu = device == "cpu"
    sizes = {TINY: (12,)} if is_cpu else SIZES
    dtype = torch.float32 if is_cpu else torch.bfloat16
    pairs = [(shape, size) for shape in sizes for size in sizes[shape]]
    return [
        Case(shape.name, size, name, dtype, partial(draw, shape, size, name, dtype))
        for (shape, size), name in product(pairs, ROUTINGS)
    ]


def _permute_work(inputs: RowInputs) -> Work:
    num_tokens, width = inputs.rows.shape
    num_rows = inputs.routing.tokens_R.numel()
    return permute_work(num_tokens, num_rows, width, inputs.rows.dtype)


def _combine_work(inputs: RowInputs) -> Work:
    num_tokens, num_chosen = inputs.routing.rows_TK.shape
    return combine_work(num_tokens, num_chosen, inputs.rows.shape[1], inputs.rows.dtype)


def _exact_permute(inputs: RowInputs) -> tuple[Tensor, Tensor]:
    tokens_R = inputs.routing.tokens_R
    row_N = spread_rows(tokens_R.numel(), CHECKED_ROWS, tokens_R.device)
    return row_N, inputs.rows[tokens_R[row_N]].double()


def _exact_combine(inputs: RowInputs) -> tuple[Tensor, Tensor]:
    routing = inputs.routing
    token_N = spread_rows(len(routing.rows_TK), CHECKED_ROWS, inputs.rows.device)
    y_NKD = inputs.rows[routing.rows_TK[token_N]].double()
    return token_N, (routing.weights_TK[token_N].double().unsqueeze(-1) * y_NKD).sum(dim=1)


def _run_permute(impl: Impl, inputs: RowInputs) -> Call:
    return lambda: permute(inputs.rows, inputs.routing.tokens_R, impl=impl)


def _run_combine(impl: Impl, inputs: RowInputs) -> Call:
    routing = inputs.routing
    return lambda: combine(inputs.rows, routing.weights_TK, routing.rows_TK, impl=impl)


def _gather(x_TD: Tensor, tokens_R: Tensor) -> Tensor:
    return x_TD.index_select(0, tokens_R)


def _weighted_sum(y_RD: Tensor, weights_TK: Tensor, rows_TK: Tensor) -> Tensor:
    y_TKD = y_RD.index_select(0, rows_TK.flatten()).unflatten(0, rows_TK.shape)
    out_TD: Tensor = (weights_TK.unsqueeze(-1) * y_TKD).sum(dim=1).to(y_RD.dtype)
    return out_TD


_gather_function = cache(lambda: compiled(_gather))
_sum_function = cache(lambda: compiled(_weighted_sum))


def _run_gather(inputs: RowInputs) -> Call:
    demand_gpu(inputs.rows)
    return lambda: _gather_function()(inputs.rows, inputs.routing.tokens_R)


def _run_sum(inputs: RowInputs) -> Call:
    demand_gpu(inputs.rows)
    routing = inputs.routing
    return lambda: _sum_function()(inputs.rows, routing.weights_TK, routing.rows_TK)


PERMUTE: Op[RowInputs] = Op(
    "permute",
    partial(_cases, partial(_draw, False)),
    [
        Peer(OURS, partial(_run_permute, "auto")),
        Peer("torch eager", partial(_run_permute, "torch")),
        Peer("torch.compile", _run_gather, is_compiled=True),
    ],
    _permute_work,
    _exact_permute,
)
COMBINE: Op[RowInputs] = Op(
    "combine",
    partial(_cases, partial(_draw, True)),
    [
        Peer(OURS, partial(_run_combine, "auto")),
        Peer("torch eager", partial(_run_combine, "torch")),
        Peer("torch.compile", _run_sum, is_compiled=True),
    ],
    _combine_work,
    _exact_combine,
)
