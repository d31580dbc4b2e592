"""Triton forms on a real GPU: bfloat16 too, larger shapes, skewed routing, CUDA graphs."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention import AttentionPattern, varlen_attention
from kernels.dispatch import Impl
from kernels.grouped_ffn import grouped_ffn
from kernels.norm import add_rmsnorm
from kernels.permute import combine, permute
from kernels.routing import Routing, route
from kernels.trees import TreeEnsemble, tree_ensemble

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NearCheck = Callable[[Tensor, Tensor], None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LOGIT_STEP = 8  # logits are eighths: equal ones tie exactly, others differ beyond rounding
# T, D, F, E, K, rows of a tile; the first is the `base` preset
SIZES = [
    (800, 128, 192, 16, 2, 64),
    (1, 128, 192, 16, 2, 64),
    (1009, 520, 136, 7, 3, 32),
    (4096, 512, 384, 128, 8, 128),
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


def layer(
    x_TD: Tensor, logits_TE: Tensor, weights: tuple[Tensor, Tensor], k: int, impl: Impl
) -> Tensor:
    """Route, permute, experts, combine."""
    bias_E = torch.zeros(logits_TE.shape[1], device="cuda")
    routing = route(logits_TE, bias_E, k, impl=impl)
    rows_RD = permute(x_TD, routing.tokens_R, impl=impl)
    y_RD = grouped_ffn(rows_RD, *weights, routing, impl=impl)
    return combine(y_RD, routing.weights_TK, routing.rows_TK, impl=impl)


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
def test_permute_experts_combine(
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
    rows_RD = permute(x_TD, routing.tokens_R, impl="triton")
    assert torch.equal(rows_RD, permute(x_TD, routing.tokens_R, impl="reference"))
    weights = draw_experts(num_experts, width, hidden, dtype)
    y_RD = grouped_ffn(rows_RD, *weights, routing, impl="triton")
    assert_near(y_RD, grouped_ffn(rows_RD, *weights, routing, impl="reference"))
    got_TD, want_TD = (
        combine(y_RD, routing.weights_TK, routing.rows_TK, impl=impl)
        for impl in ("triton", "reference")
    )
    assert_near(got_TD, want_TD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(800, 128), (4099, 2048), (7, 7168)])
def test_norm(dtype: torch.dtype, shape: tuple[int, int], assert_near: NearCheck) -> None:
    x_TD, residual_TD = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    weight_D = torch.randn(shape[1], device="cuda").to(dtype)
    got = add_rmsnorm(x_TD, residual_TD, weight_D, 1e-6, impl="triton")
    want = add_rmsnorm(x_TD, residual_TD, weight_D, 1e-6, impl="reference")
    assert_near(got[0], want[0])
    assert torch.equal(got[1], want[1])


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


def test_trees(assert_near: NearCheck) -> None:
    num_trees, depth, num_features = 203, 6, 24
    nodes, leaves = 2**depth - 1, 2**depth
    ensemble = TreeEnsemble(
        torch.randint(0, num_features, (num_trees, nodes), dtype=torch.int32, device="cuda"),
        torch.randn(num_trees, nodes, device="cuda"),
        torch.rand(num_trees, nodes, device="cuda") < 0.5,
        torch.randn(num_trees, leaves, device="cuda") * num_trees**-0.5,
        torch.randn(num_trees, leaves, num_features, device="cuda") * num_trees**-0.5,
        torch.tensor(0.25, device="cuda"),
    )
    x_NF = torch.randn(1003, num_features, device="cuda")
    x_NF = x_NF.masked_fill(torch.rand_like(x_NF) < 0.1, torch.nan)
    want = tree_ensemble(x_NF, ensemble, impl="reference")
    for got, expected in zip(tree_ensemble(x_NF, ensemble, impl="triton"), want, strict=True):
        assert_near(got, expected)


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


def test_large_row_offsets_do_not_overflow(assert_near: NearCheck) -> None:
    num_rows, width = 300_000, 8192  # 2.4e9 elements, beyond int32
    x_TD = torch.zeros(num_rows, width, dtype=torch.bfloat16, device="cuda")
    x_TD[-1] = 1.0
    tokens_R = torch.tensor([num_rows - 1, 0], dtype=torch.int32, device="cuda")
    rows_RD = permute(x_TD, tokens_R, impl="triton")
    assert rows_RD.sum(dim=1).tolist() == [width, 0.0]
    normed_TD, _ = add_rmsnorm(x_TD, None, x_TD[-1].clone(), 0.0, impl="triton")
    assert_near(normed_TD[-1], torch.ones(width, dtype=torch.bfloat16))
