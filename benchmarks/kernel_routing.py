"""The router: from scores to chosen experts, weights, the order of the rows, loads and tiles.

Legend: T tokens, E experts, K chosen, R routed rows.
"""

from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_moe import BASE, LARGE, QWEN3, ROUTINGS, TINY, MoEShape, draw_logits
from benchmarks.kernel_op import OURS, Call, Case, Op, Peer, compiled, demand_gpu, spread_rows
from benchmarks.kernel_roofline import Work, route_work
from kernels.dispatch import Impl
from kernels.routing import route, route_and_balance

CHECKED_TOKENS = 64
BIAS_RATE = 1e-3
DEEPSEEK = MoEShape("deepseek-v3", 256, 8, 7168, 2048)
SIZES = {QWEN3: (16, 64, 256, 16384), LARGE: (256, 8192), BASE: (256, 8192), DEEPSEEK: (16384,)}


class RoutingInputs(NamedTuple):
    """Scores [T, E], selection bias [E] and K."""

    logits: Tensor
    bias: Tensor
    num_chosen: int


def draw_routing(
    shape: MoEShape, num_tokens: int, routing: str, generator: torch.Generator
) -> RoutingInputs:
    """Return scores and a bias that seldom changes the choice."""
    noise_E = torch.randn(shape.num_experts, generator=generator, device=generator.device)
    logits_TE = draw_logits(num_tokens, shape.num_experts, routing, generator)
    return RoutingInputs(logits_TE, 1e-3 * noise_E, shape.num_chosen)


def _cases(device: str) -> Sequence[Case[RoutingInputs]]:
    sizes = {TINY: (12,)} if device == "cpu" else SIZES
    pairs = [(shape, size) for shape in sizes for size in sizes[shape]]
    return [
        Case(shape.name, size, name, torch.float32, partial(draw_routing, shape, size, name))
        for (shape, size), name in product(pairs, ROUTINGS)
    ]


def _work(inputs: RoutingInputs) -> Work:
    num_tokens, num_experts = inputs.logits.shape
    return route_work(num_tokens, num_experts, inputs.num_chosen, route(*inputs).block_rows)


def _exact(inputs: RoutingInputs) -> tuple[Tensor, Tensor]:
    token_N = spread_rows(len(inputs.logits), CHECKED_TOKENS, inputs.logits.device)
    chosen = route(*inputs._replace(logits=inputs.logits[token_N]), impl="reference")
    score_NK = inputs.logits[token_N].double().sigmoid().gather(1, chosen.experts_TK.long())
    return token_N, score_NK / score_NK.sum(dim=1, keepdim=True)


def _run(impl: Impl, inputs: RoutingInputs) -> Call:
    return lambda: route(*inputs, impl=impl).weights_TK


def _run_balanced(inputs: RoutingInputs) -> Call:
    return lambda: route_and_balance(*inputs, BIAS_RATE)[0].weights_TK


def _plain(logits_TE: Tensor, bias_E: Tensor, num_chosen: int) -> tuple[Tensor, ...]:
    """What a model's author would write: sort the choices, count them; no tile map."""
    score_TE = logits_TE.sigmoid()
    experts_TK = (score_TE + bias_E).topk(num_chosen, dim=1).indices
    score_TK = score_TE.gather(1, experts_TK)
    weights_TK = score_TK / score_TK.sum(dim=1, keepdim=True)
    order = experts_TK.flatten().sort(stable=True)
    every_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    ends_E = torch.searchsorted(order.values, every_E, right=True)
    rows_R = torch.empty_like(order.indices)
    rows_R[order.indices] = torch.arange(rows_R.numel(), device=logits_TE.device)
    return weights_TK, experts_TK, rows_R, order.indices // num_chosen, ends_E


_plain_function = cache(lambda: compiled(_plain))


def _run_compiled(inputs: RoutingInputs) -> Call:
    demand_gpu(inputs.logits)
    return lambda: _plain_function()(*inputs)[0]


def _run_vllm(inputs: RoutingInputs) -> Call:
    """Its two launches; its order pads each expert's rows to blocks of 64."""
    ops: Any = import_module("vllm._custom_ops")
    demand_gpu(inputs.logits)
    (num_tokens, num_experts), device = inputs.logits.shape, inputs.logits.device
    num_rows, block = num_tokens * inputs.num_chosen, 64
    padded = num_rows + num_experts * (block - 1)

    def call() -> Tensor:
        weights_TK = torch.empty(num_tokens, inputs.num_chosen, device=device)
        experts_TK = torch.empty_like(weights_TK, dtype=torch.int32)
        ops.topk_sigmoid(
            weights_TK,
            experts_TK,
            torch.empty_like(experts_TK),
            inputs.logits,
            True,
            inputs.bias,
        )
        sorted_P = torch.empty(padded, dtype=torch.int32, device=device)
        blocks_M = sorted_P.new_empty(-(-padded // block))
        num_padded = sorted_P.new_empty(1)
        ops.moe_align_block_size(experts_TK, num_experts, block, sorted_P, blocks_M, num_padded)
        return weights_TK

    return call


ROUTING: Op[RoutingInputs] = Op(
    "routing",
    _cases,
    [
        Peer(OURS, partial(_run, "auto")),
        Peer(f"{OURS} with balance", _run_balanced),
        Peer("torch eager", partial(_run, "torch")),
        Peer("vLLM topk + align", _run_vllm),
        Peer("torch.compile", _run_compiled, is_compiled=True),
    ],
    _work,
    _exact,
)
