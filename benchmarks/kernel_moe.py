"""The experts' feed-forward: alone on rows in expert order, and whole from tokens to tokens.

Shapes of published models and of our presets, with tokens spread evenly over the experts or
by Zipf's law: the expert of rank r is drawn 1 / r as often as the first.

Legend: T tokens, D model, F expert hidden, E experts, K chosen, R routed rows.
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
from benchmarks.kernel_roofline import Work, experts_work, moe_work
from core_model.config import PRESETS
from kernels.dispatch import Impl
from kernels.grouped_ffn import grouped_ffn
from kernels.permute import combine, permute
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
EXPERTS_SIZES = {QWEN3: (64, 1024, 16384), LARGE: (256,), BASE: (256,)}


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
    return MoEInputs(
        x=drawn(num_tokens, d),
        logits=logits_TE,
        gate_up=drawn(e, 2 * f, d).mul_(d**-0.5),
        down=drawn(e, d, f).mul_(f**-0.5),
        routing=route(logits_TE, torch.zeros(e, device=device), shape.num_chosen),
    )


def _cases(sizes: dict[MoEShape, tuple[int, ...]], device: str) -> Sequence[Case[MoEInputs]]:
    is_cpu = device == "cpu"
    sizes = {TINY: (12,)} if is_cpu else sizes
    dtype = torch.float32 if is_cpu else torch.bfloat16
    pairs = [(shape, size) for shape in sizes for size in sizes[shape]]
    return [
        Case(shape.name, size, routing, dtype, partial(draw_moe, shape, size, routing, dtype))
        for (shape, size), routing in product(pairs, ROUTINGS)
    ]


def _experts_work(inputs: MoEInputs) -> Work:
    _, d, f = inputs.down.shape
    num_active = int((inputs.routing.load_E > 0).sum())
    return experts_work(inputs.routing.tokens_R.numel(), num_active, d, f, inputs.x.dtype)


def _moe_work(inputs: MoEInputs) -> Work:
    num_tokens, d = inputs.x.shape
    return moe_work(num_tokens, inputs.routing.tokens_R.numel(), _experts_work(inputs), d)


def exact_rows(inputs: MoEInputs, x_ND: Tensor, expert_N: Tensor) -> Tensor:
    """Return each row's output of its expert, float64 [N, D]."""
    rows = []
    for x_D, expert in zip(x_ND.double(), expert_N.tolist(), strict=True):
        gate_F, up_F = (inputs.gate_up[expert].double() @ x_D).chunk(2)
        rows.append(inputs.down[expert].double() @ (functional.silu(gate_F) * up_F))
    return torch.stack(rows)


def _exact_experts(inputs: MoEInputs) -> tuple[Tensor, Tensor]:
    routing = inputs.routing
    row_N = spread_rows(routing.tokens_R.numel(), CHECKED_TOKENS, inputs.x.device)
    expert_N = torch.searchsorted(routing.ends_E, row_N, right=True)
    return row_N, exact_rows(inputs, inputs.x[routing.tokens_R[row_N]], expert_N)


def _exact_moe(inputs: MoEInputs) -> tuple[Tensor, Tensor]:
    token_N = spread_rows(len(inputs.x), CHECKED_TOKENS, inputs.x.device)
    expert_NK = inputs.routing.experts_TK[token_N]
    x_ND = inputs.x[token_N].repeat_interleave(expert_NK.shape[1], dim=0)
    y_NKD = exact_rows(inputs, x_ND, expert_NK.flatten()).unflatten(0, expert_NK.shape)
    weights_NK1 = inputs.routing.weights_TK[token_N].double().unsqueeze(-1)
    return token_N, (weights_NK1 * y_NKD).sum(dim=1)


def _run_experts(impl: Impl, inputs: MoEInputs) -> Call:
    x_RD = inputs.x[inputs.routing.tokens_R].contiguous()
    weights = (inputs.gate_up, inputs.down)
    return lambda: grouped_ffn(x_RD, *weights, inputs.routing, impl=impl)


def _run_moe(impl: Impl, inputs: MoEInputs) -> Call:
    def call() -> Tensor:
        routing = inputs.routing
        x_RD = permute(inputs.x, routing.tokens_R, impl=impl)
        y_RD = grouped_ffn(x_RD, inputs.gate_up, inputs.down, routing, impl=impl)
        return combine(y_RD, routing.weights_TK, routing.rows_TK, impl=impl)

    return call


def _run_routed(inputs: MoEInputs) -> Call:
    """From the scores, as those peers begin which order the rows themselves."""
    num_chosen = inputs.routing.experts_TK.shape[1]
    bias_E = inputs.logits.new_zeros(inputs.logits.shape[1])

    def call() -> Tensor:
        routing = route(inputs.logits, bias_E, num_chosen)
        return _run_moe("auto", inputs._replace(routing=routing))()

    return call


EXPERTS: Op[MoEInputs] = Op(
    "experts",
    partial(_cases, EXPERTS_SIZES),
    [
        Peer(OURS, partial(_run_experts, "auto")),
        Peer("torch eager", partial(_run_experts, "torch")),
        Peer("torch grouped_mm", peers.experts_by_grouped_mm),
        Peer("DeepGEMM bf16", peers.experts_by_deep_gemm),
        Peer("torch.compile grouped_mm", peers.experts_compiled, is_compiled=True),
    ],
    _experts_work,
    _exact_experts,
)
MOE: Op[MoEInputs] = Op(
    "moe",
    partial(_cases, MOE_SIZES),
    [
        Peer(OURS, partial(_run_moe, "auto")),
        Peer(f"{OURS} from scores", _run_routed),
        Peer("torch eager", partial(_run_moe, "torch")),
        Peer("torch grouped_mm", peers.moe_by_grouped_mm),
        Peer("liger-kernel", peers.moe_by_liger),
        Peer("vLLM fused_experts", peers.moe_by_vllm),
        Peer("torch.compile grouped_mm", peers.moe_compiled, is_compiled=True),
    ],
    _moe_work,
    _exact_moe,
)
