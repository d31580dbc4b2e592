"""A whole step of the shared blocks: a model, tokens of all applications, and the exact result.

A third of the tokens are transactions (spans of one and two tokens), a third windows of
telemetry (65 and two), the rest windows of a CT study (up to 1,792, each seeing its
neighbourhood and the case's tokens), as their adapters hand them over.  Each run of equal spans is
a task of its own to the routers.

Legend: T tokens, D model, H heads, d head width, E experts, K chosen, F hidden, N checked tokens.
"""

from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.kernel_roofline import Work, attention_work
from core_model.blocks import Attention, Block
from core_model.config import PRESETS, MoEConfig
from core_model.moe import MoELayer
from core_model.packing import SpanGroup, merge_groups, offsets_from_lengths
from core_model.series_tasks import EXTRA_TOKENS
from core_model.volume_tasks import NUM_CASE, ORGAN_GRID
from kernels.attention import FULL, AttentionPattern
from kernels.norm import add_rmsnorm
from kernels.routing import route

CHECKED_TOKENS = 4
TELEMETRY = (64 + 1, EXTRA_TOKENS - 1)  # spans of a window of 64 rows
WINDOW = NUM_CASE + ORGAN_GRID.num_patches
NEAR = AttentionPattern(window=320, num_global=NUM_CASE)  # as ``core_model.volume`` has it
LONG_TOKENS = 100_000  # one sequence, full attention: for the memory of a whole forward

Segment = tuple[int, int]  # spans, tokens of each


class Step(nn.Module):
    """The blocks and the norm behind them.

    Args:
        config: Sizes.
        num_tasks: How many have selection biases of their own.
        is_dense: Whether the blocks have no routed experts.
    """

    def __init__(self, config: MoEConfig, num_tasks: int = 1, *, is_dense: bool = False) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            Block(config, num_tasks, is_dense=is_dense) for _ in range(config.num_layers)
        )
        self.final_norm = nn.Parameter(torch.ones(config.d_model))

    def forward(self, tokens_TD: Tensor, groups: list[SpanGroup], owner_T: Tensor) -> Tensor:
        """Return normalised tokens [T, D]; do what ``MoETransformer.run_blocks`` does."""
        branch_TD, residual_TD, chosen = tokens_TD, None, []
        for block in self.blocks:
            branch_TD, residual_TD, experts_TK = block(branch_TD, residual_TD, groups, owner_T)
            if experts_TK is not None:
                chosen.append(experts_TK)
        normed_TD, _ = add_rmsnorm(branch_TD, residual_TD, self.final_norm, self.config.rms_eps)
        if chosen:
            torch.stack(chosen)
        return normed_TD


class StepInputs(NamedTuple):
    """Model, tokens [T, D] and whose they are, spans as the blocks get them, runs of equal ones."""

    model: Step
    tokens: Tensor
    owner: Tensor
    groups: list[SpanGroup]
    segments: tuple[Segment, ...]


def mixed_segments(num_tokens: int) -> tuple[Segment, ...]:
    """Return the spans of a step: transactions, telemetry and CT in equal parts."""
    transactions = max(1, num_tokens // 3 // 3)
    windows = num_tokens // 3 // sum(TELEMETRY)
    rest = num_tokens - 3 * transactions - sum(TELEMETRY) * windows
    whole, part = divmod(rest, WINDOW)
    found = [(transactions, 1), (transactions, 2), (windows, TELEMETRY[0]), (windows, TELEMETRY[1])]
    found += [(whole, WINDOW), (1, part)]
    return tuple((count, length) for count, length in found if count and length)


def long_segments(num_tokens: int) -> tuple[Segment, ...]:
    """Return one sequence, behind the few tokens alone that are checked."""
    return ((CHECKED_TOKENS, 1), (1, num_tokens - CHECKED_TOKENS))


def pattern_of(segments: tuple[Segment, ...]) -> AttentionPattern:
    """Return the pattern of the longest spans."""
    return NEAR if max(length for _, length in segments) <= WINDOW else FULL


def draw_step(
    preset: str,
    segments: tuple[Segment, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> StepInputs:
    """Return a model with random weights, and tokens."""
    config, device = PRESETS[preset], generator.device
    torch.manual_seed(generator.initial_seed())
    with torch.device(device):
        model = Step(config, len(segments))
    narrow(model, dtype)
    lengths = torch.tensor([count * length for count, length in segments], device=device)
    task = torch.arange(len(segments), dtype=torch.int32, device=device)
    owner_T = task.repeat_interleave(lengths)
    num_tokens = len(owner_T)
    tokens_TD = torch.randn(num_tokens, config.d_model, generator=generator, device=device)
    groups = []
    for count, length in segments:
        lengths_B = torch.full((count,), length, device=device)
        pattern = FULL if pattern_of(((1, length),)).sees_all(length) else pattern_of(segments)
        groups.append(SpanGroup(count * length, offsets_from_lengths(lengths_B), pattern, length))
    return StepInputs(model, tokens_TD.to(dtype), owner_T, merge_groups(groups), segments)


def narrow(model: Step, dtype: torch.dtype) -> None:
    """Convert all but the routers, as a served model is."""
    for name, parameter in model.named_parameters():
        if not name.endswith("router"):
            parameter.data = parameter.data.to(dtype)
    model.eval()


def dense_of(config: MoEConfig) -> MoEConfig:
    """Return a stack without a choice whose tokens meet as many parameters."""
    hidden = config.d_expert * config.num_chosen
    return replace(config, num_experts=1, num_chosen=1, d_expert=hidden)


def dense_step(inputs: StepInputs) -> Step:
    """Return blocks without a choice whose tokens meet as many parameters."""
    dense = dense_of(inputs.model.config)
    hidden = dense.d_expert + dense.d_shared
    config = replace(dense, dense_layers=1, d_dense=hidden)
    with torch.device(inputs.tokens.device):
        model = Step(config, is_dense=True)
    narrow(model, inputs.tokens.dtype)
    return model


def step_work(inputs: StepInputs) -> Work:
    """Weights of the experts that tokens choose when they choose at random, tokens; all products."""
    config, (num_tokens, d) = inputs.model.config, inputs.tokens.shape
    e, k, f, shared = config.num_experts, config.num_chosen, config.d_expert, config.d_shared
    active = e * (1.0 - (1.0 - k / e) ** num_tokens)
    dtype = inputs.tokens.dtype
    words = 4 * d * d + 3 * d * shared + active * 3 * d * f
    layer_bytes = words * dtype.itemsize + 4 * e * d
    products = 4 * d * d + d * e + 3 * d * (shared + k * f)
    lengths = [length for count, length in inputs.segments for _ in range(count)]
    attention = attention_work(
        lengths, pattern_of(inputs.segments), config.num_heads, config.d_head, dtype
    )
    layers = config.num_layers
    return Work(
        layers * layer_bytes + 2 * num_tokens * d * dtype.itemsize,
        layers * (2 * num_tokens * products + attention.flops),
        dtype,
    )


def exact_step(inputs: StepInputs) -> tuple[Tensor, Tensor]:
    """Return the first tokens, which are spans of their own, through all blocks in float64.

    A choice that rounding moves, of experts as good as each other, is an error like any other.
    """
    row_N = torch.arange(min(CHECKED_TOKENS, inputs.segments[0][0]), device=inputs.tokens.device)
    stream_ND, eps = inputs.tokens[row_N].double(), inputs.model.config.rms_eps
    for each in inputs.model.blocks:
        block = cast("Block", each)
        attention, moe = cast("Attention", block.attention), cast("MoELayer", block.moe)
        x_ND = _normed(stream_ND, block.attention_norm, eps)
        value_ND = x_ND @ attention.qkv[-x_ND.shape[1] :].double().T  # a span of one sees itself
        stream_ND = stream_ND + value_ND @ attention.out.double().T
        x_ND = _normed(stream_ND, block.moe_norm, eps)
        stream_ND = stream_ND + _experts(x_ND, moe)
    return row_N, _normed(stream_ND, inputs.model.final_norm, eps)


def _normed(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    scale_N1 = (x_ND.square().mean(dim=1, keepdim=True) + eps).rsqrt()
    return x_ND * scale_N1 * weight_D.double()


def _swiglu(x_ND: Tensor, gate_up_GD: Tensor, down_DF: Tensor) -> Tensor:
    gate_NF, up_NF = (x_ND @ gate_up_GD.double().T).chunk(2, dim=1)
    out_ND: Tensor = (functional.silu(gate_NF) * up_NF) @ down_DF.double().T
    return out_ND


def _experts(x_ND: Tensor, moe: MoELayer) -> Tensor:
    logits_NE = (x_ND @ moe.router.double().T).float()
    chosen = route(logits_NE, moe.expert_bias[0], moe.num_chosen, impl="reference")
    rows = []
    for x_1D, experts, weights_K in zip(
        x_ND.split(1), chosen.experts_TK.tolist(), chosen.weights_TK.double(), strict=True
    ):
        parts = [_swiglu(x_1D, moe.gate_up[e], moe.down[e]) for e in experts]
        rows.append((weights_K.view(-1, 1, 1) * torch.stack(parts)).sum(dim=0))
    shared_ND = _swiglu(x_ND, moe.shared_gate_up, moe.shared_down)
    return shared_ND + moe.routed_scale * torch.cat(rows)
