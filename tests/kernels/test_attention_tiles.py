"""The form for long sequences, at tile sizes that make tiny ones long."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.attention import FULL, AttentionPattern, attention_reference
from kernels.attention_config import TileConfig, using

NearCheck = Callable[[Tensor, Tensor], None]
PATTERNS = [
    FULL,
    AttentionPattern(window=0),
    AttentionPattern(window=64),
    AttentionPattern(window=10, num_global=3),
    AttentionPattern(window=40, num_global=20),
    AttentionPattern(window=6, num_global=100),  # all global
]
OFFSETS = [[0, 70], [0, 0, 1, 41, 41, 60]]
PAIRS = [  # a few of them quick; a test of all takes 4 to 15 s in the interpreter
    pytest.param(
        pattern, offsets, marks=[] if is_quick else pytest.mark.slow, id=f"{pattern} {offsets}"
    )
    for pattern in PATTERNS
    for offsets in OFFSETS
    for is_quick in [(PATTERNS.index(pattern), len(offsets)) in {(0, 6), (3, 2), (4, 6)}]
]
ONCE = PAIRS[1::4] + PAIRS[2::4]  # each pattern, with either offsets in turn
TILE = TileConfig(16, 16, num_warps=4, num_stages=2)
CHUNK = 32
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's
TIMES_OWN = {torch.float32: 4.0, torch.float16: 1.5}  # of the formula's error


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from kernels._triton import attention_grad, attention_tiles

    monkeypatch.setattr(attention_tiles, "CHUNK", CHUNK)
    monkeypatch.setattr(attention_grad, "CHUNK", CHUNK)
    with (
        using("window", TILE),
        using("full", TILE),
        using("grad_queries", TILE),
        using("grad_keys", TILE),
    ):
        yield


def draw(num_rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as the strided views that a fused projection gives."""
    q_THd, k_THd, v_THd = torch.randn(num_rows, 3, 2, 16, device=device).to(dtype).unbind(dim=1)
    return q_THd, k_THd, v_THd


def run(
    qkv: tuple[Tensor, Tensor, Tensor], offsets: list[int], pattern: AttentionPattern
) -> tuple[Tensor, Tensor]:
    from kernels._triton.attention_tiles import launch_tiles

    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=qkv[0].device)
    return launch_tiles(*qkv, cu_seqlens, pattern, with_lse=True)


@pytest.mark.parametrize(("pattern", "offsets"), PAIRS)
def test_error_is_that_of_the_formula_in_this_dtype(
    pattern: AttentionPattern, offsets: list[int], device: torch.device
) -> None:
    dtype = torch.float32 if len(offsets) == 2 else torch.float16
    qkv = draw(offsets[-1], device, dtype)
    got, _ = run(qkv, offsets, pattern)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    q, k, v = (x.double() for x in qkv)
    exact = attention_reference(q, k, v, cu_seqlens, pattern)
    own = (attention_reference(*qkv, cu_seqlens, pattern) - exact).abs().max()
    least = torch.finfo(dtype).eps  # of values around 1
    assert (got - exact).abs().max() <= TIMES_OWN[dtype] * own + least


@pytest.mark.parametrize("pattern", [FULL, PATTERNS[4]], ids=str)
def test_totals_are_those_of_the_softmax(pattern: AttentionPattern, device: torch.device) -> None:
    from kernels.attention import visible

    q, k, v = draw(70, device, torch.float32)
    _, lse_HT = run((q, k, v), [0, 70], pattern)
    position = torch.arange(70, device=device)
    hidden = ~visible(position, position, pattern)
    score_HQK = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / 4
    want_HT = score_HQK.masked_fill(hidden, -torch.inf).logsumexp(dim=2) / math.log(2)
    torch.testing.assert_close(lse_HT.double(), want_HT, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("pattern", "broken"), [(FULL, torch.nan), (PATTERNS[3], torch.inf)], ids=str
)
def test_broken_values_stay_inside_their_sequence(
    pattern: AttentionPattern, broken: float, device: torch.device
) -> None:
    offsets, qkv = [0, 20, 55, 70], draw(70, device, torch.float32)
    whole, _ = run(qkv, offsets, pattern)
    for tensor in qkv:
        tensor[20] = broken
        tensor[54] = broken
    got, _ = run(qkv, offsets, pattern)
    assert not got[20].isfinite().any()
    assert torch.equal(got[:20], whole[:20])
    assert torch.equal(got[55:], whole[55:])


def test_long_sequences_with_aligned_rows_come_here(device: torch.device) -> None:
    from kernels._triton.attention_tiles import fits

    long = torch.tensor([0, 256], dtype=torch.int32, device=device)
    short = torch.arange(0, 257, 4, dtype=torch.int32, device=device)
    qkv = draw(256, device, torch.float16)
    odd = draw(256, device, torch.float16)[0][:, :, :12]
    apart = torch.zeros(256, 2, 16, dtype=torch.float16, device=device)
    shifted = torch.zeros(256 * 32 + 1, dtype=torch.float16, device=device)[1:].view(256, 2, 16)
    assert fits(*qkv, long)
    assert not fits(*qkv, short)
    assert not fits(odd, odd, odd, long)
    assert not fits(shifted, apart, apart, long)
    by_heads = torch.zeros(2, 256, 16, dtype=torch.float16, device=device).transpose(0, 1)
    assert not fits(by_heads, by_heads, by_heads, long)


@pytest.mark.parametrize(("pattern", "offsets"), ONCE)
def test_gradients_are_those_of_the_formula(
    pattern: AttentionPattern, offsets: list[int], device: torch.device, assert_near: NearCheck
) -> None:
    from kernels._triton.attention_grad import attend

    drawn = draw(offsets[-1], device, torch.float32)
    q, k, v = leaves = [x.clone().requires_grad_() for x in drawn]
    wide_q, wide_k, wide_v = wide = [x.double().requires_grad_() for x in drawn]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    weight_THd = torch.randn(leaves[0].shape, device=device)
    (attend(q, k, v, cu_seqlens, pattern) * weight_THd).sum().backward()
    out = attention_reference(wide_q, wide_k, wide_v, cu_seqlens, pattern)
    (out * weight_THd).sum().backward()
    for got, want in zip(leaves, wide, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert_near(got.grad, want.grad)
