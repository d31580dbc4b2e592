"""Triton forms on a real GPU: bfloat16 too, larger shapes, skewed routing, CUDA graphs."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from kernels._triton.fused_moe import launch as launch_moe
from kernels._triton.fused_moe_fp8 import launch as launch_fp8
from kernels._triton.fused_moe_fp8_wide import fits
from kernels.attention import AttentionPattern, attention_reference, varlen_attention
from kernels.block_sparse import SparsePattern, block_sparse_attention
from kernels.dispatch import Impl
from kernels.fused_moe import SharedExpert, fused_moe, launch
from kernels.fused_moe_fp8 import E4M3, fused_moe_fp8, quantize_experts, quantize_rows
from kernels.moe_config import MoESize, rule
from kernels.norm import add_rmsnorm, add_rmsnorm_fp8
from kernels.routing import Routing, route, route_and_balance, route_tokens
from kernels.swiglu import swiglu_ffn
from kernels.trees import TreeEnsemble, tree_ensemble

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NearCheck = Callable[[Tensor, Tensor], None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GRADIENT_ERROR = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 2e-5}  # of the norm
FLIPPED = 0.02  # error over the norm: hidden values in 8 bits that round the other way
MORE_ROUNDINGS = 4  # than in the reference: the hidden row and each expert's output
TF32_ERROR = 1e-5  # of the norm, by three tf32 products each
LOGIT_STEP = 8  # logits are eighths: equal ones tie exactly, others differ beyond rounding
ROUTED = [  # T, E, K, groups: no token, one, primes, one program and all, all sizes of tiles
    (0, 128, 8, (1, 1)),
    (1, 128, 8, (1, 1)),
    (31, 128, 8, (1, 1)),
    (256, 128, 8, (1, 1)),
    (257, 1, 1, (1, 1)),
    (9973, 128, 8, (1, 1)),
    (16384, 256, 8, (8, 4)),
    (16384, 256, 8, (1, 1)),
]
# T, D, F, E, K, rows of a tile; the first is the `base` preset
SIZES = [
    (800, 128, 192, 16, 2, 64),
    (1, 128, 192, 16, 2, 64),
    (1009, 520, 136, 7, 3, 32),
    (4096, 512, 384, 128, 8, 128),
]


# the same, of an expert layer beside a shared expert: narrow, wide with a narrow shared one, wide
BESIDE = [
    SIZES[0],
    SIZES[1],
    (300, 128, 384, 16, 2, 32),
    (1009, 520, 136, 7, 3, 32),
    (4099, 1024, 768, 64, 4, 128),
]


def draw_logits(num_tokens: int, num_experts: int, *, zipf: bool) -> Tensor:
    """Return router logits; under Zipf the expert of rank r is chosen about 1 / r as often."""
    logits_TE = torch.randn(num_tokens, num_experts, device="cuda")
    if zipf:
        logits_TE -= torch.arange(1, num_experts + 1, device="cuda").log()
    return (logits_TE.clamp(-4, 4) * LOGIT_STEP).round() / LOGIT_STEP


def draw_experts(
    num_experts: int, width: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(num_experts, 2 * hidden, width, device="cuda") * width**-0.5
    down = torch.randn(num_experts, width, hidden, device="cuda") * hidden**-0.5
    return gate_up.to(dtype), down.to(dtype)


def draw_shared(x_TD: Tensor, hidden: int) -> SharedExpert:
    gate_up, down = draw_experts(1, x_TD.shape[1], hidden, x_TD.dtype)
    return SharedExpert(gate_up[0], down[0], 0.5)


def layer(
    x_TD: Tensor, logits_TE: Tensor, weights: tuple[Tensor, Tensor], k: int, impl: Impl
) -> Tensor:
    """Route, then the experts."""
    bias_E = torch.zeros(logits_TE.shape[1], device="cuda")
    routing = route(logits_TE, bias_E, k, impl=impl)
    return fused_moe(x_TD, *weights, routing, impl=impl)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("zipf", [False, True])
def test_routing(
    size: tuple[int, int, int, int, int, int], zipf: bool, assert_near: NearCheck
) -> None:
    num_tokens, _, _, num_experts, num_chosen, block_rows = size
    logits_TE = draw_logits(num_tokens, num_experts, zipf=zipf)
    bias_E = torch.randint(-1, 2, (num_experts,), device="cuda") * 2.0  # beyond any score
    for bias in (bias_E, torch.zeros_like(bias_E)):
        got, want = (
            route(logits_TE, bias, num_chosen, block_rows=block_rows, impl=impl)
            for impl in ("triton", "reference")
        )
        assert_near(got.weights_TK, want.weights_TK)
        for name in Routing._fields[1:-1]:
            assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("size", ROUTED, ids=str)
@pytest.mark.parametrize("num_valid", [None, 0.6])
def test_routing_is_one_exact_order(
    size: tuple[int, int, int, tuple[int, int]], num_valid: float | None, assert_near: NearCheck
) -> None:
    num_tokens, num_experts, num_chosen, (num_groups, chosen_groups) = size
    logits_TE = draw_logits(num_tokens, num_experts, zipf=True)
    logits_TE[num_tokens // 3 :: 17] = torch.nan
    bias_E = torch.randint(-1, 2, (num_experts,), device="cuda") * 2.0
    counts = {"num_groups": num_groups, "chosen_groups": chosen_groups, "num_valid": None}
    if num_valid is not None:
        count = torch.tensor([int(num_tokens * num_valid)], dtype=torch.int32, device="cuda")
        counts["num_valid"] = count  # type: ignore[assignment]
    given = (logits_TE, bias_E, num_chosen, 1e-3)
    (got, balance), (again, _), (want, exact) = (
        route_and_balance(*given, impl=impl, **counts)  # type: ignore[arg-type]
        for impl in ("triton", "triton", "reference")
    )
    assert_near(got.weights_TK, want.weights_TK)
    assert torch.equal(got.weights_TK.nan_to_num(), again.weights_TK.nan_to_num())
    for name in Routing._fields[1:-1]:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert torch.equal(getattr(got, name), getattr(again, name)), name
    assert_near(balance.violation_1, exact.violation_1)
    assert_near(balance.bias_E, exact.bias_E)


def test_routers_wait_for_their_own_programs_alone() -> None:
    """Many launches on two streams at once, whose barriers have words of their own."""
    logits = [draw_logits(4096, 128, zipf=True) for _ in range(2)]
    bias_E = torch.zeros(128, device="cuda")
    wanted = [route(each, bias_E, 8, impl="reference") for each in logits]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found: list[list[Routing]] = [[], []]
    for _ in range(50):
        for stream, each, routings in zip(streams, logits, found, strict=True):
            with torch.cuda.stream(stream):
                routings.append(route(each, bias_E, 8))
    torch.cuda.synchronize()
    for routings, want in zip(found, wanted, strict=True):
        for got in routings:
            assert torch.equal(got.rows_TK, want.rows_TK)
            assert torch.equal(got.tokens_R, want.tokens_R)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 128, 16, 2), (800, 128, 16, 2), (4099, 1024, 64, 4)], ids=str)
def test_tokens_are_routed_in_one_launch(
    dtype: torch.dtype, size: tuple[int, int, int, int], assert_near: NearCheck
) -> None:
    num_tokens, width, num_experts, num_chosen = size
    x_TD = torch.randint(-2, 3, (num_tokens, width), device="cuda").to(dtype)
    router_ED = torch.randint(-32, 33, (num_experts, width), device="cuda") / 256  # sums are exact
    bias_E = torch.zeros(num_experts, device="cuda")
    logits_TE = (x_TD.double() @ router_ED.double().T).float()
    got = route_tokens(x_TD, router_ED, bias_E, num_chosen, impl="triton")
    want = route(logits_TE, bias_E, num_chosen, impl="reference")
    saturated_T = logits_TE.sigmoid().sort(dim=1, descending=True).values[:, : num_chosen + 1]
    differs_T = (got.experts_TK != want.experts_TK).any(dim=1)
    gap_T = saturated_T.diff(dim=1).abs().min(dim=1).values
    assert not (gap_T[differs_T] > 1e-6).any()
    assert differs_T.float().mean().item() < 0.02  # what sigmoids of two libraries round apart
    if not differs_T.any():
        assert_near(got.weights_TK, want.weights_TK)
        assert torch.equal(got.rows_TK, want.rows_TK)


@pytest.mark.parametrize("zipf", [False, True])
@pytest.mark.parametrize(("num_experts", "groups"), [(256, (8, 4)), (15, (5, 2))])
def test_routing_by_groups(
    num_experts: int, groups: tuple[int, int], zipf: bool, assert_near: NearCheck
) -> None:
    logits_TE = draw_logits(1009, num_experts, zipf=zipf)
    bias_E = torch.randint(-1, 2, (num_experts,), device="cuda") * 2.0
    got, want = (
        route(logits_TE, bias_E, 5, num_groups=groups[0], chosen_groups=groups[1], impl=impl)
        for impl in ("triton", "reference")
    )
    assert_near(got.weights_TK, want.weights_TK)
    for name in Routing._fields[1:-1]:
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("zipf", [False, True])
def test_fused_moe(
    dtype: torch.dtype,
    size: tuple[int, int, int, int, int, int],
    zipf: bool,
    assert_near: NearCheck,
) -> None:
    num_tokens, width, hidden, num_experts, num_chosen, block_rows = size
    logits_TE = draw_logits(num_tokens, num_experts, zipf=zipf)
    bias_E = torch.zeros(num_experts, device="cuda")
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows, impl="reference")
    x_TD = torch.randn(num_tokens, width, device="cuda").to(dtype)
    weights = draw_experts(num_experts, width, hidden, dtype)
    got, again, want = (
        fused_moe(x_TD, *weights, routing, impl=impl) for impl in ("triton", "triton", "reference")
    )
    assert_near(got, want)
    assert torch.equal(got, again)


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("is_persistent", [False, True])
def test_fused_moe_by_every_cut(
    block_rows: int, is_persistent: bool, assert_near: NearCheck
) -> None:
    num_tokens, width, hidden, num_experts, num_chosen = 1009, 520, 136, 7, 3
    size = MoESize(num_experts, num_chosen, width, hidden, torch.bfloat16)
    by_rule = rule(size, num_tokens, block_rows)
    config = replace(
        by_rule,
        up=replace(by_rule.up, persistent=is_persistent, num_stages=3),
        down=replace(by_rule.down, persistent=is_persistent, num_stages=3),
        chained=is_persistent,
    )
    bias_E = torch.tensor([9.0, -9.0, 0.0, 0.0, 0.0, 0.0, 0.0], device="cuda")  # all, none, some
    logits_TE = draw_logits(num_tokens, num_experts, zipf=False)
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows)
    x_TD = torch.randn(num_tokens, width, device="cuda").bfloat16()
    weights = draw_experts(num_experts, width, hidden, torch.bfloat16)
    got = launch_moe(x_TD, *weights, routing, config)
    assert_near(got, fused_moe(x_TD, *weights, routing, impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 31, 509])
def test_fused_moe_errs_like_a_few_roundings(dtype: torch.dtype, num_tokens: int) -> None:
    logits_TE = draw_logits(num_tokens, 16, zipf=False)
    bias_E = torch.zeros(16, device="cuda")
    routing = route(logits_TE, bias_E, 2, block_rows=16)
    x_TD = torch.randn(num_tokens, 256, device="cuda").to(dtype)
    weights = draw_experts(16, 256, 192, dtype)
    wide = routing._replace(weights_TK=routing.weights_TK.double())
    gate_up, down = weights
    exact_TD = fused_moe(x_TD.double(), gate_up.double(), down.double(), wide, impl="reference")
    error, least = (
        (fused_moe(x_TD, *weights, routing, impl=impl).double() - exact_TD).norm()
        for impl in ("triton", "reference")
    )
    is_float32 = dtype == torch.float32
    assert 0 < error <= (TF32_ERROR * exact_TD.norm() if is_float32 else MORE_ROUNDINGS * least)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(800, 128), (4099, 2048), (7, 7168)])
def test_norm(dtype: torch.dtype, shape: tuple[int, int], assert_near: NearCheck) -> None:
    x_TD, residual_TD = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    weight_D = torch.randn(shape[1], device="cuda").to(dtype)
    got = add_rmsnorm(x_TD, residual_TD, weight_D, 1e-6, impl="triton")
    want = add_rmsnorm(x_TD, residual_TD, weight_D, 1e-6, impl="reference")
    assert_near(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("shape", [(800, 128), (1009, 4096), (7, 7168)])
def test_quantised_norm(shape: tuple[int, int], assert_near: NearCheck) -> None:
    x_TD, residual_TD = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    weight_D = torch.randn(shape[1], device="cuda").bfloat16()
    got, want = (
        add_rmsnorm_fp8(x_TD, residual_TD, weight_D, 1e-6, impl=impl)
        for impl in ("triton", "reference")
    )
    assert torch.equal(got[2], want[2])
    assert_near(got[1], want[1])
    differs = got[0].view(torch.uint8) != want[0].view(torch.uint8)
    assert differs.float().mean().item() < 1e-3  # scales that are rounded apart


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(800, 128, 192), (1, 128, 192), (4099, 1024, 768)], ids=str)
def test_swiglu(dtype: torch.dtype, size: tuple[int, int, int], assert_near: NearCheck) -> None:
    num_tokens, width, hidden = size
    x_TD = torch.randn(num_tokens, width, device="cuda").to(dtype)
    gate_up, down = draw_experts(1, width, hidden, dtype)
    got, want = (
        swiglu_ffn(x_TD, gate_up[0], down[0], impl=impl) for impl in ("triton", "reference")
    )
    assert_near(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", BESIDE, ids=str)
@pytest.mark.parametrize("chained", [False, True])
def test_fused_moe_beside_a_shared_expert(
    dtype: torch.dtype,
    size: tuple[int, int, int, int, int, int],
    chained: bool,
    assert_near: NearCheck,
) -> None:
    num_tokens, width, hidden, num_experts, num_chosen, block_rows = size
    logits_TE = draw_logits(num_tokens, num_experts, zipf=True)
    bias_E = torch.zeros(num_experts, device="cuda")
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows)
    x_TD = torch.randn(num_tokens, width, device="cuda").to(dtype)
    weights, shared = draw_experts(num_experts, width, hidden, dtype), draw_shared(x_TD, 200)
    by_rule = rule(MoESize(num_experts, num_chosen, width, hidden, dtype), num_tokens, block_rows)
    config = replace(by_rule, chained=chained)
    got, again = (launch(x_TD, *weights, routing, config, shared) for _ in range(2))
    assert_near(got, fused_moe(x_TD, *weights, routing, shared, impl="reference"))
    assert torch.equal(got, again)


@pytest.mark.parametrize("size", BESIDE, ids=str)
@pytest.mark.parametrize("num_valid", [0, 5])
def test_idle_tokens_are_given_the_shared_expert_alone(
    size: tuple[int, int, int, int, int, int], num_valid: int, assert_near: NearCheck
) -> None:
    num_tokens, width, hidden, num_experts, num_chosen, block_rows = size
    logits_TE = draw_logits(num_tokens, num_experts, zipf=False)
    bias_E = torch.zeros(num_experts, device="cuda")
    count = torch.tensor([num_valid], dtype=torch.int32, device="cuda")
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows, num_valid=count)
    x_TD = torch.randn(num_tokens, width, device="cuda").bfloat16()
    weights = draw_experts(num_experts, width, hidden, x_TD.dtype)
    shared = draw_shared(x_TD, 200)
    by_rule = rule(
        MoESize(num_experts, num_chosen, width, hidden, x_TD.dtype), num_tokens, block_rows
    )
    config = replace(by_rule, chained=True)
    got = launch(x_TD, *weights, routing, config, shared)
    want = swiglu_ffn(x_TD, *shared[:2], impl="reference")
    assert_near(got[num_valid:], want[num_valid:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 96, 128])
@pytest.mark.parametrize(
    "pattern",
    [AttentionPattern(None), AttentionPattern(1024, 64), AttentionPattern(64, 0)],
    ids=str,
)
@pytest.mark.parametrize("lengths", [[4] * 200, [3001], [4, 300, 1, 0, 1999, 64, 64] * 2], ids=len)
def test_attention(
    dtype: torch.dtype,
    width: int,
    pattern: AttentionPattern,
    lengths: list[int],
    assert_near: NearCheck,
) -> None:
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    qkv = torch.randn(sum(lengths), 3, 4, width, device="cuda").to(dtype)
    q_THd, k_THd, v_THd = qkv.unbind(dim=1)
    got, want = (
        varlen_attention(q_THd, k_THd, v_THd, offsets, pattern, impl=impl)
        for impl in ("triton", "reference")
    )
    assert_near(got, want)


def test_attention_keeps_a_broken_sequence_to_itself() -> None:
    q_THd, k_THd, v_THd = torch.randn(64, 3, 4, 32, device="cuda").bfloat16().unbind(dim=1)
    offsets = torch.arange(0, 65, 4, dtype=torch.int32, device="cuda")
    whole = varlen_attention(q_THd, k_THd, v_THd, offsets, AttentionPattern(None))
    for tensor in (q_THd, k_THd, v_THd):
        tensor[5] = torch.nan
    got = varlen_attention(q_THd, k_THd, v_THd, offsets, AttentionPattern(None))
    assert got[4:8].isnan().all()
    assert torch.equal(got[:4], whole[:4])
    assert torch.equal(got[8:], whole[8:])


LONG = [[9001], [3000, 0, 1, 257, 64, 5003], [128] * 9]


@pytest.mark.parametrize(
    ("dtype", "width", "pattern"),
    [
        (torch.bfloat16, 128, AttentionPattern(None)),
        (torch.bfloat16, 128, AttentionPattern(1024, 64)),
        (torch.bfloat16, 64, AttentionPattern(1024, 64)),
        (torch.float16, 32, AttentionPattern(100, 70)),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", LONG, ids=len)
def test_long_attention(
    dtype: torch.dtype, width: int, pattern: AttentionPattern, lengths: list[int]
) -> None:
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    q, k, v = torch.randn(sum(lengths), 3, 2, width, device="cuda").to(dtype).unbind(dim=1)
    got = varlen_attention(q, k, v, offsets, pattern, impl="triton")
    exact = attention_reference(q.double(), k.double(), v.double(), offsets, pattern)
    own = (attention_reference(q, k, v, offsets, pattern) - exact).norm()
    assert (got - exact).norm() <= 2.0 * own  # the weights are rounded too


def test_long_attention_keeps_a_broken_sequence_to_itself() -> None:
    q, k, v = torch.randn(9000, 3, 2, 64, device="cuda").bfloat16().unbind(dim=1)
    offsets = torch.tensor([0, 3001, 5900, 9000], dtype=torch.int32, device="cuda")
    pattern = AttentionPattern(1024, 64)
    whole = varlen_attention(q, k, v, offsets, pattern)
    for tensor in (q, k, v):
        tensor[3001] = tensor[5899] = torch.nan
    got = varlen_attention(q, k, v, offsets, pattern)
    assert got[[3001, 5899]].isnan().all()
    assert torch.equal(got[:3001], whole[:3001])
    assert torch.equal(got[5900:], whole[5900:])


@pytest.mark.parametrize(
    ("lengths", "pattern"),
    [
        (LONG[0], AttentionPattern(1024, 64)),
        (LONG[1], AttentionPattern(1024, 64)),
        (LONG[2], AttentionPattern(100, 0)),
    ],
    ids=str,
)
def test_gradients_of_long_attention(lengths: list[int], pattern: AttentionPattern) -> None:
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    qkv = torch.randn(sum(lengths), 3, 2, 128, device="cuda").bfloat16().requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    weight = torch.randn(sum(lengths), 2, 128, device="cuda").bfloat16()
    q, k, v = qkv.unbind(1)
    (varlen_attention(q, k, v, offsets, pattern) * weight).sum().backward()
    q, k, v = wide.unbind(1)
    (attention_reference(q, k, v, offsets, pattern) * weight.double()).sum().backward()
    assert qkv.grad is not None
    assert wide.grad is not None
    for got, want in zip(qkv.grad.unbind(1), wide.grad.unbind(1), strict=True):
        assert (got - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize(
    ("dtype", "far"),
    [(torch.bfloat16, "dropped"), (torch.bfloat16, "pooled"), (torch.float16, "dropped")],
)
@pytest.mark.parametrize("lengths", [[4096], [1024, 0, 64, 512, 2048, 128]], ids=len)
def test_block_sparse(
    dtype: torch.dtype, far: Literal["dropped", "pooled"], lengths: list[int]
) -> None:
    pattern = SparsePattern(num_selected=4, window=256, num_global=64, far=far)
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    # quarters, and lengths of powers of two: scores are exact, so all forms choose the same
    qkv = (torch.randn(sum(lengths), 3, 2, 64, device="cuda") * 2).round().clamp(-4, 4) / 4
    q, k, v = qkv.to(dtype).unbind(dim=1)
    got, want = (
        block_sparse_attention(q, k, v, offsets, pattern, impl=impl)
        for impl in ("triton", "reference")
    )
    assert (got.double() - want.double()).norm() <= 0.01 * want.double().norm()


def test_attention_replays_in_a_cuda_graph_with_other_lengths() -> None:
    q, k, v = torch.randn(4096, 3, 2, 64, device="cuda").bfloat16().unbind(dim=1)
    offsets = torch.tensor([0, 4096, 4096, 4096], dtype=torch.int32, device="cuda")
    patterns = (AttentionPattern(256, 8), SparsePattern(4, 256, 64))

    def run() -> tuple[Tensor, Tensor]:
        return (
            varlen_attention(q, k, v, offsets, patterns[0]),
            block_sparse_attention(q, k, v, offsets, patterns[1]),
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile outside the capture
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for lengths in ([0, 4096, 4096, 4096], [0, 100, 2500, 4096], [0, 0, 1, 4096]):
        offsets.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("num_rows", "num_trees", "depth", "num_features", "width"),
    [(1003, 203, 6, 24, 24), (32771, 37, 4, 32, 128), (65536, 30, 4, 32, 1)],
)
def test_trees(
    num_rows: int,
    num_trees: int,
    depth: int,
    num_features: int,
    width: int,
    assert_near: NearCheck,
) -> None:
    nodes, leaves = 2**depth - 1, 2**depth
    ensemble = TreeEnsemble(
        torch.randint(0, num_features, (num_trees, nodes), dtype=torch.int32, device="cuda"),
        torch.randn(num_trees, nodes, device="cuda"),
        torch.rand(num_trees, nodes, device="cuda") < 0.5,
        torch.randn(num_trees, leaves, device="cuda") * num_trees**-0.5,
        torch.randn(num_trees, leaves, width, device="cuda") * num_trees**-0.5,
        torch.tensor(0.25, device="cuda"),
    )
    x_NF = torch.randn(num_rows, num_features, device="cuda")
    x_NF = x_NF.masked_fill(torch.rand_like(x_NF) < 0.1, torch.nan)
    want = tree_ensemble(x_NF, ensemble, impl="reference")
    for got, expected in zip(tree_ensemble(x_NF, ensemble, impl="triton"), want, strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES[::2], ids=str)
def test_gradients_of_fused_moe(
    dtype: torch.dtype, size: tuple[int, int, int, int, int, int]
) -> None:
    num_tokens, width, hidden, num_experts, num_chosen, block_rows = size
    logits_TE = draw_logits(num_tokens, num_experts, zipf=True)
    bias_E = torch.zeros(num_experts, device="cuda")
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows, impl="reference")
    x_TD = torch.randn(num_tokens, width, device="cuda").to(dtype)
    scale_TD = torch.randn(num_tokens, width, device="cuda")
    gate_up, down = draw_experts(num_experts, width, hidden, dtype)
    weights_TK = routing.weights_TK.clone()
    leaves = [each.requires_grad_() for each in (x_TD, gate_up, down, weights_TK)]
    routed = routing._replace(weights_TK=weights_TK)
    grads = []
    impls: tuple[Impl, ...] = ("auto", "auto", "reference")
    for impl in impls:
        out_TD = fused_moe(x_TD, gate_up, down, routed, impl=impl)
        grads.append(torch.autograd.grad((out_TD.float() * scale_TD).sum(), leaves))
    for got, again, want in zip(*grads, strict=True):
        assert torch.equal(got, again)
        error, norm = (got.float() - want.float()).norm(), want.float().norm()
        assert error <= GRADIENT_ERROR[dtype] * norm, (got.shape, error / norm)


@pytest.mark.parametrize("zipf", [False, True])
@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@pytest.mark.parametrize(("num_tokens", "num_chosen"), [(1, 2), (509, 2), (1024, 4)])
def test_fused_moe_fp8(zipf: bool, block_rows: int, num_tokens: int, num_chosen: int) -> None:
    logits_TE = draw_logits(num_tokens, 16, zipf=zipf)
    bias_E = torch.zeros(16, device="cuda")
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows)
    x_TD = torch.randn(num_tokens, 640, device="cuda").bfloat16()
    gate_up, down = draw_experts(16, 640, 384, torch.bfloat16)
    inputs = (*quantize_rows(x_TD), quantize_experts(gate_up, down), routing)
    got, again, want = (
        fused_moe_fp8(*inputs, impl=impl).double() for impl in ("triton", "triton", "reference")
    )
    assert (got - want).norm() <= FLIPPED * want.norm()
    assert torch.equal(got, again)


@pytest.mark.parametrize("num_tokens", [1, 31, 509])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_wide_products_in_8_bits_give_what_the_others_give(num_tokens: int, group: int) -> None:
    """Both forms sum in the same order; few hidden values round the other way."""
    logits_TE, bias_E = draw_logits(num_tokens, 16, zipf=True), torch.zeros(16, device="cuda")
    x_TD = torch.randn(num_tokens, 640, device="cuda").bfloat16()
    x_TD[0] = torch.nan
    experts = quantize_experts(*draw_experts(16, 640, 384, torch.bfloat16))
    pairs = (quantize_rows(x_TD), experts[:2], experts[2:])
    size = MoESize(16, 2, 640, 384, E4M3)
    outs = []
    for block_rows in (64, 128):
        routing = route(logits_TE, bias_E, 2, block_rows=block_rows)
        assert fits(routing) == (block_rows == 128)
        config = rule(size, num_tokens, block_rows)
        cut = replace(config.up, group=group)
        config = replace(config, up=cut, down=cut)
        outs.append(launch_fp8(*pairs, routing, config, torch.bfloat16).double())
    want, got = outs
    assert got.isnan().any(dim=1).nonzero().flatten().tolist() == [0]
    assert (got - want)[1:].norm() <= FLIPPED * want[1:].norm()


def test_auto_picks_triton_only_without_gradient() -> None:
    x_TD = torch.randn(64, 128, device="cuda")
    weight_D = torch.ones(128, device="cuda", requires_grad=True)
    normed_TD, _ = add_rmsnorm(x_TD, None, weight_D, 1e-6)
    assert normed_TD.requires_grad
    with torch.no_grad():
        by_auto, _ = add_rmsnorm(x_TD, None, weight_D, 1e-6)
        by_triton, _ = add_rmsnorm(x_TD, None, weight_D, 1e-6, impl="triton")
    assert torch.equal(by_auto, by_triton)


def test_routing_and_experts_replay_in_a_cuda_graph(assert_near: NearCheck) -> None:
    num_tokens, width, hidden, num_experts, num_chosen, _ = SIZES[0]
    weights = draw_experts(num_experts, width, hidden, torch.bfloat16)
    x_TD = torch.randn(num_tokens, width, device="cuda").bfloat16()
    logits_TE = draw_logits(num_tokens, num_experts, zipf=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile outside the capture
        layer(x_TD, logits_TE, weights, num_chosen, "triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = layer(x_TD, logits_TE, weights, num_chosen, "triton")
    for zipf in (True, False):  # other loads, other tiles, the same graph
        logits_TE.copy_(draw_logits(num_tokens, num_experts, zipf=zipf))
        x_TD.copy_(torch.randn(num_tokens, width, device="cuda"))
        graph.replay()
        assert math.isfinite(out_TD.float().sum().item())
        assert_near(out_TD, layer(x_TD, logits_TE, weights, num_chosen, "reference"))


def test_chained_launches_replay_in_a_cuda_graph(assert_near: NearCheck) -> None:
    num_tokens, width, hidden, num_experts, num_chosen, block_rows = SIZES[0]
    size = MoESize(num_experts, num_chosen, width, hidden, torch.bfloat16)
    config = replace(rule(size, num_tokens, block_rows), chained=True)
    weights = draw_experts(num_experts, width, hidden, torch.bfloat16)
    logits_TE = draw_logits(num_tokens, num_experts, zipf=True)
    routing = route(
        logits_TE, torch.zeros(num_experts, device="cuda"), num_chosen, block_rows=block_rows
    )
    tokens = [torch.randn(num_tokens, width, device="cuda").bfloat16() for _ in range(4)]
    launch_moe(tokens[0], *weights, routing, config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # buffers of one call are those of the next
        outputs = [launch_moe(x_TD, *weights, routing, config) for x_TD in tokens]
    for _ in range(3):
        for x_TD in tokens:
            x_TD.copy_(torch.randn(num_tokens, width, device="cuda"))
        graph.replay()
        for x_TD, out_TD in zip(tokens, outputs, strict=True):
            assert_near(out_TD, fused_moe(x_TD, *weights, routing, impl="reference"))


@pytest.mark.parametrize("size", BESIDE[::2], ids=str)
def test_chained_launches_beside_a_shared_expert_replay_in_a_cuda_graph(
    size: tuple[int, int, int, int, int, int], assert_near: NearCheck
) -> None:
    num_tokens, width, hidden, num_experts, num_chosen, block_rows = size
    by_rule = rule(
        MoESize(num_experts, num_chosen, width, hidden, torch.bfloat16), num_tokens, block_rows
    )
    config = replace(by_rule, chained=True)
    weights = draw_experts(num_experts, width, hidden, torch.bfloat16)
    logits_TE = draw_logits(num_tokens, num_experts, zipf=True)
    bias_E = torch.zeros(num_experts, device="cuda")
    routing = route(logits_TE, bias_E, num_chosen, block_rows=block_rows)
    first_TD = torch.randn(num_tokens, width, device="cuda").bfloat16()
    shared = draw_shared(first_TD, 200)

    def run() -> list[Tensor]:  # each layer's tokens are what the one before wrote
        outputs = [first_TD]
        for _ in range(3):
            outputs.append(launch(outputs[-1], *weights, routing, config, shared))
        return outputs

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for _ in range(3):
        first_TD.copy_(torch.randn(num_tokens, width, device="cuda"))
        graph.replay()
        for x_TD, out_TD in itertools.pairwise(outputs):
            want = fused_moe(x_TD, *weights, routing, shared, impl="reference")
            assert_near(out_TD, want)


def test_large_row_offsets_do_not_overflow(assert_near: NearCheck) -> None:
    num_rows, width = 300_000, 8192  # 2.4e9 elements, beyond int32
    x_TD = torch.zeros(num_rows, width, dtype=torch.bfloat16, device="cuda")
    x_TD[-1] = 1.0
    weights = draw_experts(1, width, 16, torch.bfloat16)
    got = layer(x_TD, torch.zeros(num_rows, 1, device="cuda"), weights, 1, "triton")
    want = layer(x_TD[-1:], torch.zeros(1, 1, device="cuda"), weights, 1, "reference")
    assert_near(got[-1:], want)
    assert not got[:-1].any()
    normed_TD, _ = add_rmsnorm(x_TD, None, x_TD[-1].clone(), 0.0, impl="triton")
    assert_near(normed_TD[-1], torch.ones(width, dtype=torch.bfloat16))
