"""A whole step of the shared blocks, from tokens to normalised tokens, as a served model runs it.

``launches`` are those of the step: of one block that less two, over the blocks.  Small models come
first, since a large one takes seconds to draw.
``peak_mb`` is what a forward needs beside model and tokens.

Legend: T tokens, D model, H heads, d head width, E experts, K chosen, R routed rows.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_op import OURS, Call, Case, Op, Peer, compiled, demand_gpu
from benchmarks.kernel_step_inputs import (
    LONG_TOKENS,
    Segment,
    StepInputs,
    dense_step,
    draw_step,
    exact_step,
    long_segments,
    mixed_segments,
    pattern_of,
    step_work,
)
from core_model.blocks import Attention, Block
from kernels.attention import visible

if TYPE_CHECKING:
    from core_model.moe import MoELayer

SIZES = {"base": (256, 1024, 8192), "large": (256, 1024, 8192)}
TINY_SIZE = 90


def _cases(device: str) -> Sequence[Case[StepInputs]]:
    is_cpu = device == "cpu"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    sizes = {"tiny": (TINY_SIZE,)} if is_cpu else SIZES
    steps = [
        (f"{preset} mixed", preset, n, mixed_segments(n)) for preset in sizes for n in sizes[preset]
    ]
    if not is_cpu:
        alone = ("base one sequence", "base", LONG_TOKENS, long_segments(LONG_TOKENS))
        steps.insert(len(SIZES["base"]), alone)
    return [
        Case(name, size, "-", dtype, partial(draw_step, preset, spans, dtype))
        for name, preset, size, spans in steps
    ]


def _run_ours(inputs: StepInputs) -> Call:
    return lambda: inputs.model(inputs.tokens, inputs.groups, inputs.owner)


def _run_dense(inputs: StepInputs) -> Call:
    model = dense_step(inputs)
    return lambda: model(inputs.tokens, inputs.groups, inputs.owner)


class _Weights(NamedTuple):
    """Of one block, as plain torch takes them."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    moe_norm: Tensor
    router: Tensor
    bias: Tensor
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor
    shared_down: Tensor


class _Plan(NamedTuple):
    """What is known of a step before it runs."""

    segments: tuple[Segment, ...]
    num_heads: int
    num_chosen: int
    scale: float
    eps: float


def _weights_of(block: Block) -> _Weights:
    attention, moe = cast("Attention", block.attention), cast("MoELayer", block.moe)
    return _Weights(
        block.attention_norm,
        attention.qkv,
        attention.out,
        block.moe_norm,
        moe.router,
        moe.expert_bias,
        moe.gate_up,
        moe.down,
        moe.shared_gate_up,
        moe.shared_down,
    )


def _normed(
    branch_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed_TD = branch_TD if residual_TD is None else branch_TD + residual_TD
    return functional.rms_norm(summed_TD, weight_D.shape, weight_D, eps), summed_TD


def _attend(x_TD: Tensor, weights: _Weights, plan: _Plan, masks: Sequence[Tensor | None]) -> Tensor:
    """Attention of each run of equal spans at once, by PyTorch's own (flash where it can)."""
    qkv_T3Hd = functional.linear(x_TD, weights.qkv).unflatten(1, (3, plan.num_heads, -1))
    mixed, first = [], 0
    for (count, length), mask in zip(plan.segments, masks, strict=True):
        part = qkv_T3Hd[first : first + count * length].unflatten(0, (count, length))
        q, k, v = part.permute(2, 0, 3, 1, 4).unbind()
        out_BHnd = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed.append(out_BHnd.transpose(1, 2).flatten(0, 1).flatten(1))
        first += count * length
    return functional.linear(torch.cat(mixed), weights.out)


def _swiglu(x_TD: Tensor, gate_up_GD: Tensor, down_DF: Tensor) -> Tensor:
    gate_TF, up_TF = functional.linear(x_TD, gate_up_GD).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate_TF) * up_TF, down_DF)


def _experts(x_TD: Tensor, weights: _Weights, plan: _Plan, owner_T: Tensor) -> Tensor:
    score_TE = functional.linear(x_TD.float(), weights.router).sigmoid()
    bias_TE = weights.bias.index_select(0, owner_T)
    experts_TK = (score_TE + bias_TE).topk(plan.num_chosen, dim=1).indices
    gate_TK = score_TE.gather(1, experts_TK)
    gate_TK = gate_TK / gate_TK.sum(dim=1, keepdim=True)
    order = experts_TK.flatten().sort(stable=True)
    every_E = torch.arange(len(weights.router), device=x_TD.device)
    ends_E = torch.searchsorted(order.values, every_E, right=True, out_int32=True)
    x_RD = x_TD.index_select(0, order.indices // plan.num_chosen)
    hidden_RG = functional.grouped_mm(x_RD, weights.gate_up.transpose(1, 2), offs=ends_E)
    gate_RF, up_RF = hidden_RG.chunk(2, dim=1)
    hidden_RF = functional.silu(gate_RF) * up_RF
    y_RD = functional.grouped_mm(hidden_RF, weights.down.transpose(1, 2), offs=ends_E)
    y_RD = y_RD * gate_TK.flatten()[order.indices].unsqueeze(1).to(y_RD.dtype)
    routed_TD = torch.zeros_like(x_TD).index_add(0, order.indices // plan.num_chosen, y_RD)
    shared_TD = _swiglu(x_TD, weights.shared_gate_up, weights.shared_down)
    return torch.add(shared_TD, routed_TD, alpha=plan.scale)


def _plain_block(
    branch_TD: Tensor,
    residual_TD: Tensor | None,
    weights: _Weights,
    plan: _Plan,
    masks: Sequence[Tensor | None],
    owner_T: Tensor,
) -> tuple[Tensor, Tensor]:
    """What a model's author would write."""
    x_TD, residual_TD = _normed(branch_TD, residual_TD, weights.attention_norm, plan.eps)
    branch_TD = _attend(x_TD, weights, plan, masks)
    x_TD, residual_TD = _normed(branch_TD, residual_TD, weights.moe_norm, plan.eps)
    return _experts(x_TD, weights, plan, owner_T), residual_TD


_compiled_block = cache(lambda: compiled(_plain_block))


def _run_plain(inputs: StepInputs, *, is_compiled: bool = False) -> Call:
    if is_compiled:
        demand_gpu(inputs.tokens)
    config, model, device = inputs.model.config, inputs.model, inputs.tokens.device
    blocks = [_weights_of(cast("Block", each)) for each in model.blocks]
    scale, eps = config.routed_scale, config.rms_eps
    plan = _Plan(inputs.segments, config.num_heads, config.num_chosen, scale, eps)
    pattern, masks = pattern_of(inputs.segments), list[Tensor | None]()
    for _, length in inputs.segments:
        position = torch.arange(length, device=device)
        is_whole = pattern.sees_all(length)
        masks.append(None if is_whole else visible(position, position, pattern))
    run = _compiled_block() if is_compiled else _plain_block

    def call() -> Tensor:
        branch_TD, residual_TD = inputs.tokens, None
        for weights in blocks:
            branch_TD, residual_TD = run(branch_TD, residual_TD, weights, plan, masks, inputs.owner)
        return _normed(branch_TD, residual_TD, model.final_norm, eps)[0]

    return call


STEP: Op[StepInputs] = Op(
    "step",
    _cases,
    [
        Peer(OURS, _run_ours),
        Peer("torch eager", _run_plain),
        Peer("dense of equal size", _run_dense, does_less="chooses no experts"),
        Peer("torch.compile", partial(_run_plain, is_compiled=True), is_compiled=True),
    ],
    step_work,
    exact_step,
)
