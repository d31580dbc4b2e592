import math
from collections.abc import Callable
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

import kernels.attention
from kernels.attention import FULL, AttentionPattern, varlen_attention
from kernels.dispatch import Form, Impl

NearCheck = Callable[[Tensor, Tensor], None]
FORMS = get_args(Form)

PATTERNS = [
    FULL,
    AttentionPattern(window=0),
    AttentionPattern(window=5),
    AttentionPattern(window=6, num_global=2),
    AttentionPattern(window=40, num_global=3),
]
OFFSETS = [
    [0, 4, 8, 12, 16],
    [0, 1, 4, 4, 9, 38],
    [0, 1, 3, 4, 6, 7, 9],  # one and two positions, as transactions have
    [0, 1, 2, 3],
    [0, 2, 4, 6],
    [0, 97],
    [0, 70, 140],
]


def draw(num_rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as the strided views that a fused projection gives."""
    qkv = torch.randn(num_rows, 3, 2, 12, device=device).to(dtype)
    q_THd, k_THd, v_THd = qkv.unbind(dim=1)
    return q_THd, k_THd, v_THd


def sees(i: int, j: int, pattern: AttentionPattern) -> bool:
    if pattern.window is None:
        return True
    return abs(i - j) <= pattern.window // 2 or min(i, j) < pattern.num_global


def naive(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], pattern: AttentionPattern) -> Tensor:
    out = torch.zeros_like(q)
    for start, end in pairwise(offsets):
        for i in range(start, end):
            keys = [j for j in range(start, end) if sees(i - start, j - start, pattern)]
            for head in range(q.shape[1]):
                dots = [float(q[i, head] @ k[j, head]) / math.sqrt(q.shape[2]) for j in keys]
                weights = [math.exp(x) for x in dots]
                for j, weight in zip(keys, weights, strict=True):
                    out[i, head] += v[j, head] * (weight / sum(weights))
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reference_is_the_formula(pattern: AttentionPattern, assert_near: NearCheck) -> None:
    offsets = [0, 1, 4, 4, 13]
    q, k, v = draw(13, torch.device("cpu"), torch.float64)
    got = varlen_attention(
        q, k, v, torch.tensor(offsets, dtype=torch.int32), pattern, impl="reference"
    )
    assert_near(got, naive(q, k, v, offsets, pattern))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_forms_agree(
    impl: Impl,
    dtype: torch.dtype,
    offsets: list[int],
    pattern: AttentionPattern,
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    q, k, v = draw(offsets[-1], device, dtype)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    got = varlen_attention(q, k, v, cu_seqlens, pattern, impl=impl)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert_near(got, varlen_attention(q, k, v, cu_seqlens, pattern, impl="reference"))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_blocks_of_queries_join_without_seams(
    pattern: AttentionPattern, monkeypatch: pytest.MonkeyPatch, assert_near: NearCheck
) -> None:
    monkeypatch.setattr(kernels.attention, "BLOCK_QUERIES", 8)
    q, k, v = draw(61, torch.device("cpu"), torch.float32)
    cu_seqlens = torch.tensor([0, 61], dtype=torch.int32)
    got = varlen_attention(q, k, v, cu_seqlens, pattern, impl="torch")
    assert_near(got, varlen_attention(q, k, v, cu_seqlens, pattern, impl="reference"))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_one_masked_product_equals_the_formula(
    offsets: list[int], pattern: AttentionPattern, device: torch.device, assert_near: NearCheck
) -> None:
    """What trains on a GPU, on any device."""
    q, k, v = draw(offsets[-1], device, torch.float32)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    got = kernels.attention._masked(q, k, v, cu_seqlens, pattern)
    assert_near(got, varlen_attention(q, k, v, cu_seqlens, pattern, impl="reference"))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("pattern", [FULL, PATTERNS[3]], ids=str)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_values_stay_inside_their_sequence(
    impl: Impl, pattern: AttentionPattern, broken: float, device: torch.device
) -> None:
    q, k, v = draw(12, device, torch.float32)
    cu_seqlens = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=device)
    whole = varlen_attention(q, k, v, cu_seqlens, pattern, impl=impl)
    for tensor in (q, k, v):
        tensor[5] = broken
    got = varlen_attention(q, k, v, cu_seqlens, pattern, impl=impl)
    assert not got[5].isfinite().any()
    assert torch.equal(got[:4], whole[:4])
    assert torch.equal(got[8:], whole[8:])


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_nothing_to_attend(impl: Impl, offsets: list[int], device: torch.device) -> None:
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    got = varlen_attention(*draw(0, device, torch.float32), cu_seqlens, FULL, impl=impl)
    assert got.shape == (0, 2, 12)


@pytest.mark.parametrize("impl", FORMS)
def test_order_of_sequences_does_not_matter(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    q, k, v = draw(10, device, torch.float32)
    forward = torch.tensor([0, 3, 10], dtype=torch.int32, device=device)
    backward = torch.tensor([0, 7, 10], dtype=torch.int32, device=device)
    order = torch.tensor([3, 4, 5, 6, 7, 8, 9, 0, 1, 2], device=device)
    whole = varlen_attention(q, k, v, forward, PATTERNS[3], impl=impl)
    swapped = varlen_attention(q[order], k[order], v[order], backward, PATTERNS[3], impl=impl)
    assert_near(swapped, whole[order])


@pytest.mark.parametrize("pattern", [FULL, PATTERNS[3]], ids=str)
@pytest.mark.parametrize("offsets", [[0, 4, 8], [0, 3, 8, 19], [0, 1, 3, 4, 6], [0, 2, 4]], ids=str)
def test_gradients_agree(
    pattern: AttentionPattern, offsets: list[int], assert_near: NearCheck
) -> None:
    q, k, v = leaves = [torch.randn(offsets[-1], 2, 12, requires_grad=True) for _ in range(3)]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    grads = []
    for impl in FORMS[:2]:
        out = varlen_attention(q, k, v, cu_seqlens, pattern, impl=impl)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert_near(got, want)


def test_negative_window_is_refused() -> None:
    with pytest.raises(ValueError, match="expected window"):
        AttentionPattern(window=-1)


def test_strided_heads_are_refused() -> None:
    q = torch.zeros(4, 8, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="stride 1"):
        varlen_attention(q, q, q, torch.tensor([0, 4], dtype=torch.int32), FULL)
