"""A small case of each kernel: what ``compute-sanitizer`` is run over.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
    python -m pytest tests/kernels/test_small_gpu.py -q

Without the caching allocator each tensor ends where its memory ends.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from kernels._triton.fused_moe import launch as launch_moe
from kernels.attention import FULL, AttentionPattern, varlen_attention
from kernels.block_sparse import SparsePattern, block_sparse_attention
from kernels.compress import pool_spans
from kernels.fused_moe import SharedExpert, fused_moe, launch
from kernels.fused_moe_fp8 import fused_moe_fp8, quantize_experts, quantize_rows
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
OFFSETS = [0, 70, 70, 71, 259]  # of sequences: no tile is full, one is empty
NEAR = 0.02  # of the norm, in bfloat16 and in 8 bits


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def is_near(got: Tensor, want: Tensor) -> bool:
    return bool((got.double() - want.double()).norm() <= NEAR * want.double().norm())


def routed(num_tokens: int, block_rows: int) -> Routing:
    """Route in torch, so that what follows is the op alone."""
    logits_TE, bias_E = normal(num_tokens, 16), torch.zeros(16, device="cuda")
    return route(logits_TE, bias_E, 2, block_rows=block_rows, impl="reference")


@pytest.mark.parametrize("num_tokens", [1, 37, 700])
def test_routing(num_tokens: int) -> None:
    logits_TE, bias_E = normal(num_tokens, 24), torch.zeros(24, device="cuda")
    x_TD, router_ED = normal(num_tokens, 72).bfloat16(), normal(24, 72)
    for got, want in (
        [route(logits_TE, bias_E, 3, impl=impl) for impl in ("triton", "reference")],
        [
            route_and_balance(logits_TE, bias_E, 3, 1e-3, num_groups=4, chosen_groups=2, impl=impl)[
                0
            ]
            for impl in ("triton", "reference")
        ],
        [route_tokens(x_TD, router_ED, bias_E, 3, impl=impl) for impl in ("triton", "reference")],
    ):
        assert is_near(got.weights_TK, want.weights_TK)
        for name in Routing._fields[1:-1]:
            assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize(("num_tokens", "block_rows"), [(1, 16), (37, 16), (150, 64)])
@pytest.mark.parametrize(("width", "hidden"), [(128, 192), (520, 136)])  # two launches, three
def test_experts(num_tokens: int, block_rows: int, width: int, hidden: int) -> None:
    routing = routed(num_tokens, block_rows)
    x_TD = normal(num_tokens, width).bfloat16().requires_grad_()
    gate_up = (normal(16, 2 * hidden, width) * width**-0.5).bfloat16().requires_grad_()
    down = (normal(16, width, hidden) * hidden**-0.5).bfloat16().requires_grad_()
    leaves, weight_TD = (x_TD, gate_up, down), normal(num_tokens, width)
    got, want = (
        torch.autograd.grad((fused_moe(*leaves, routing, impl=impl) * weight_TD).sum(), leaves)
        for impl in ("auto", "reference")
    )
    assert all(map(is_near, got, want))
    with torch.no_grad():
        config = rule(MoESize(16, 2, width, hidden, x_TD.dtype), num_tokens, block_rows)
        want_TD = fused_moe(*leaves, routing, impl="reference")
        for is_persistent in (False, True):
            ways = [replace(w, persistent=is_persistent) for w in (config.up, config.down)]
            as_said = replace(config, up=ways[0], down=ways[1], chained=is_persistent)
            assert is_near(launch_moe(*leaves, routing, as_said), want_TD)


@pytest.mark.parametrize("num_tokens", [1, 16, 64])
@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
def test_router_and_narrow_experts(num_tokens: int, block_rows: int) -> None:
    """As ``base`` has them; a sweep of them once ended with an illegal access (docs/log.md)."""
    logits_TE, bias_E = normal(num_tokens, 16), torch.zeros(16, device="cuda")
    x_TD = normal(num_tokens, 128).bfloat16()
    gate_up, down = normal(16, 384, 128).bfloat16() / 11, normal(16, 128, 192).bfloat16() / 14
    routing = route(logits_TE, bias_E, 2, block_rows=block_rows)
    got = fused_moe(x_TD, gate_up, down, routing)
    assert is_near(got, fused_moe(x_TD, gate_up, down, routing, impl="reference"))


@pytest.mark.parametrize("block_rows", [16, 64, 128])
def test_experts_in_8_bits(block_rows: int) -> None:
    routing, x_TD = routed(150, block_rows), normal(150, 640).bfloat16()
    gate_up, down = normal(16, 768, 640) * 640**-0.5, normal(16, 640, 384) * 384**-0.5
    experts = quantize_experts(gate_up.bfloat16(), down.bfloat16())
    inputs = (*quantize_rows(x_TD), experts, routing)
    got, want = (fused_moe_fp8(*inputs, impl=impl) for impl in ("triton", "reference"))
    assert is_near(got, want)


@pytest.mark.parametrize("pattern", [FULL, AttentionPattern(64, 8)], ids=str)
@pytest.mark.parametrize("width", [32, 128])
def test_attention(pattern: AttentionPattern, width: int) -> None:
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device="cuda")
    qkv = normal(OFFSETS[-1], 3, 2, width).bfloat16().requires_grad_()
    weight_THd = normal(OFFSETS[-1], 2, width)

    def both(impl: Literal["auto", "reference"]) -> tuple[Tensor, Tensor]:
        q, k, v = qkv.unbind(1)
        out_THd = varlen_attention(q, k, v, offsets, pattern, impl=impl)
        return out_THd, torch.autograd.grad((out_THd * weight_THd).sum(), qkv)[0]

    want_THd, exact_grad = both("reference")
    got_THd, grad = both("auto")
    with torch.no_grad():
        q, k, v = qkv.unbind(1)
        alone_THd = varlen_attention(q, k, v, offsets, pattern, impl="triton")
    for got, want in ((got_THd, want_THd), (alone_THd, want_THd), (grad, exact_grad)):
        assert is_near(got, want)


@pytest.mark.parametrize("far", ["dropped", "pooled"])
def test_block_sparse(far: Literal["dropped", "pooled"]) -> None:
    pattern = SparsePattern(num_selected=2, window=64, num_global=64, far=far)
    offsets = torch.tensor([0, 512, 512, 768], dtype=torch.int32, device="cuda")
    # quarters, and lengths of powers of two: scores are exact, so all forms choose the same
    qkv = (normal(768, 3, 2, 64) * 2).round().clamp(-4, 4) / 4
    q, k, v = qkv.bfloat16().unbind(1)
    got, want = (
        block_sparse_attention(q, k, v, offsets, pattern, impl=impl)
        for impl in ("triton", "reference")
    )
    assert is_near(got, want)


def test_compression() -> None:
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device="cuda")
    k_THd = normal(OFFSETS[-1], 2, 64).bfloat16()
    got, want = (pool_spans(k_THd, offsets, 16, impl=impl) for impl in ("triton", "reference"))
    assert is_near(got, want)


@pytest.mark.parametrize("shape", [(37, 128), (5, 4096), (3, 520)])
def test_norm(shape: tuple[int, int], assert_near: NearCheck) -> None:
    x_TD, residual_TD = normal(2, *shape).bfloat16().unbind()
    weight_D = normal(shape[1]).bfloat16()
    inputs = (x_TD, residual_TD, weight_D, 1e-6)
    got, want = (add_rmsnorm(*inputs, impl=impl) for impl in ("triton", "reference"))
    assert_near(got[0], want[0])
    if shape[1] % 128 == 0:
        quantised, exact = (add_rmsnorm_fp8(*inputs, impl=i) for i in ("triton", "reference"))
        assert_near(quantised[1], exact[1])


@pytest.mark.parametrize("num_tokens", [1, 150])
def test_swiglu(num_tokens: int, assert_near: NearCheck) -> None:
    x_TD = normal(num_tokens, 128).bfloat16()
    gate_up, down = normal(384, 128).bfloat16() / 11, normal(128, 192).bfloat16() / 14
    got, want = (swiglu_ffn(x_TD, gate_up, down, impl=impl) for impl in ("triton", "reference"))
    assert_near(got, want)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 37, 150])
@pytest.mark.parametrize(("width", "hidden"), [(128, 192), (128, 272), (520, 136)])
def test_experts_beside_a_shared_one(
    chained: bool, num_tokens: int, width: int, hidden: int
) -> None:
    """Two launches, three, four."""
    routing, x_TD = routed(num_tokens, 16), normal(num_tokens, width).bfloat16()
    gate_up = (normal(16, 2 * hidden, width) * width**-0.5).bfloat16()
    down = (normal(16, width, hidden) * hidden**-0.5).bfloat16()
    shared = SharedExpert(gate_up[0, :240].contiguous(), down[0, :, :120].contiguous(), 0.5)
    by_rule = rule(MoESize(16, 2, width, hidden, x_TD.dtype), num_tokens, 16)
    config = replace(by_rule, chained=chained)
    got = launch(x_TD, gate_up, down, routing, config, shared)
    assert is_near(got, fused_moe(x_TD, gate_up, down, routing, shared, impl="reference"))


@pytest.mark.parametrize(("num_rows", "width"), [(37, 1), (37, 24), (33000, 24)])
def test_trees(num_rows: int, width: int, assert_near: NearCheck) -> None:
    ensemble = TreeEnsemble(
        torch.randint(0, 11, (20, 15), dtype=torch.int32, device="cuda"),
        normal(20, 15),
        normal(20, 15) < 0,
        normal(20, 16),
        normal(20, 16, width),
        torch.tensor(0.25, device="cuda"),
    )
    x_NF = normal(num_rows, 11)
    got, want = (tree_ensemble(x_NF, ensemble, impl=impl) for impl in ("triton", "reference"))
    for one, exact in zip(got, want, strict=True):
        assert_near(one, exact)
