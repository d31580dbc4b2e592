"""The layer of routed experts, from tokens to tokens.

Shapes of published models and of our presets, with tokens spread evenly over the experts or
by Zipf's law: the expert of rank r is drawn 1 / r as often as the first.

Legend: T tokens, D model, F expert hidden, E experts, K chosen.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import kernel_moe_peers as peers
from benchmarks.kernel_moe_inputs import MoEInputs
from benchmarks.kernel_op import OURS, Call, Case, Op, Peer, spread_rows
from benchmarks.kernel_roofline import Work, moe_work
from core_model.config import PRESETS
from kernels.dispatch import Impl
from kernels.fused_moe import fused_moe, tile_rows
from kernels.routing import route

CHECKED_TOKENS = 16
ROUTINGS = ("uniform", "zipf")


class MoEShape(NamedTuple):
    """Sizes of a layer of experts."""

    name: str
    num_experts: int
    num_chosen: int
    width: int
    hidden: int


def preset_shape(name: str) -> MoEShape:
    """Return the layer of one of our presets."""
    config = PRESETS[name]
    return MoEShape(name, config.num_experts, config.num_chosen, config.d_model, config.d_expert)


QWEN3 = MoEShape("qwen3", 128, 8, 2048, 768)  # Qwen3-30B-A3B
MIXTRAL = MoEShape("mixtral", 8, 2, 4096, 14336)  # Mixtral-8x7B
BASE, LARGE = preset_shape("base"), preset_shape("large")
TINY = MoEShape("tiny", 4, 2, 32, 16)
MOE_SIZES = {
    QWEN3: (64, 256, 1024, 16384),
    MIXTRAL: (64, 256, 16384),
    LARGE: (16, 64, 256, 1024),
    BASE: (16, 64, 256, 1024),
}


def draw_logits(
    num_tokens: int, num_experts: int, routing: str, generator: torch.Generator
) -> Tensor:
    """Return router logits whose k largest are drawn without replacement, float32 [T, E].

    Log-probabilities and Gumbel noise; which expert has which rank is drawn too.
    """
    device = generator.device
    rank_E = torch.randperm(num_experts, generator=generator, device=device) + 1
    log_prob_E = -rank_E.log() if routing == "zipf" else torch.zeros(num_experts, device=device)
    uniform_TE = torch.rand(num_tokens, num_experts, generator=generator, device=device)
    gumbel_TE = -torch.log(-torch.log(uniform_TE.clamp(1e-7, 1 - 1e-7)))
    return log_prob_E + gumbel_TE - 5.0  # a sigmoid keeps apart what is not large


def draw_moe(
    shape: MoEShape, num_tokens: int, routing: str, dtype: torch.dtype, generator: torch.Generator
) -> MoEInputs:
    """Return tokens, weights and their routing."""
    e, d, f, device = shape.num_experts, shape.width, shape.hidden, generator.device
    drawn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    logits_TE = draw_logits(num_tokens, e, routing, generator)
    down_EDF = drawn(e, d, f).mul_(f**-0.5)
    block_rows = tile_rows(num_tokens, shape.num_chosen, down_EDF)
    bias_E = torch.zeros(e, device=device)
    return MoEInputs(
        x=drawn(num_tokens, d),
        logits=logits_TE,
        gate_up=drawn(e, 2 * f, d).mul_(d**-0.5),
        down=down_EDF,
        routing=route(logits_TE, bias_E, shape.num_chosen, block_rows=block_rows),
    )


def _cases(device: str) -> Sequence[Case[MoEInputs]]:
    is_cpu = device == "cpu"
    sizes = {TINY: (12,)} if is_cpu else MOE_SIZES
    dtype = torch.float32 if is_cpu else torch.bfloat16
    pairs = [(shape, size) for shape in sizes for size in sizes[shape]]
    return [
        Case(shape.name, size, routing, dtype, partial(draw_moe, shape, size, routing, dtype))
        for (shape, size), routing in product(pairs, ROUTINGS)
    ]


def _moe_work(inputs: MoEInputs) -> Work:
    num_tokens, d = inputs.x.shape
    num_rows, f = inputs.routing.tokens_R.numel(), inputs.down.shape[2]
    num_active = int((inputs.routing.load_E > 0).sum())
    return moe_work(num_tokens, num_rows, num_active, (d, f), inputs.x.dtype)


def exact_rows(inputs: MoEInputs, x_ND: Tensor, expert_N: Tensor) -> Tensor:
    """Return each row's output of its expert, float64 [N, D]."""
    rows = []
    for x_D, expert in zip(x_ND.double(), expert_N.tolist(), strict=True):
        gate_F, up_F = (inputs.gate_up[expert].double() @ x_D).chunk(2)
        rows.append(inputs.down[expert].double() @ (functional.silu(gate_F) * up_F))
    return torch.stack(rows)


def _exact_moe(inputs: MoEInputs) -> tuple[Tensor, Tensor]:
    token_N = spread_rows(len(inputs.x), CHECKED_TOKENS, inputs.x.device)
    expert_NK = inputs.routing.experts_TK[token_N]
    x_ND = inputs.x[token_N].repeat_interleave(expert_NK.shape[1], dim=0)
    y_NKD = exact_rows(inputs, x_ND, expert_NK.flatten()).unflatten(0, expert_NK.shape)
    weights_NK1 = inputs.routing.weights_TK[token_N].double().unsqueeze(-1)
    return token_N, (weights_NK1 * y_NKD).sum(dim=1)


def _run_moe(impl: Impl, inputs: MoEInputs) -> Call:
    experts = (inputs.gate_up, inputs.down, inputs.routing)
    return lambda: fused_moe(inputs.x, *experts, impl=impl)


def _run_routed(inputs: MoEInputs) -> Call:
    """From the scores, as those peers begin which order the rows themselves."""
    num_chosen = inputs.routing.experts_TK.shape[1]
    bias_E = inputs.logits.new_zeros(inputs.logits.shape[1])
    block_rows = inputs.routing.block_rows

    def call() -> Tensor:
        routing = route(inputs.logits, bias_E, num_chosen, block_rows=block_rows)
        return fused_moe(inputs.x, inputs.gate_up, inputs.down, routing)

    return call


MOE: Op[MoEInputs] = Op(
    "moe",
    _cases,
    [
        Peer(OURS, partial(_run_moe, "auto")),
        Peer(f"{OURS} from scores", _run_routed),
        Peer("torch eager", partial(_run_moe, "torch")),
        Peer("torch grouped_mm", peers.moe_by_grouped_mm),
        Peer("DeepGEMM bf16", peers.moe_by_deep_gemm),
        Peer("vLLM fused_experts", peers.moe_by_vllm),
        Peer("liger-kernel", peers.moe_by_liger, is_compiled=True),  # tries 104 configurations
        Peer("torch.compile grouped_mm", peers.moe_compiled, is_compiled=True),
    ],
    _moe_work,
    _exact_moe,
)
