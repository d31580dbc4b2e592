from collections.abc import Callable, Iterator
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from kernels.attention import FULL, varlen_attention
from kernels.attention_config import TileConfig, using
from kernels.block_sparse import SparsePattern, block_sparse_attention, seen_blocks
from kernels.dispatch import Form, Impl

NearCheck = Callable[[Tensor, Tensor], None]
FORMS = get_args(Form)
Far = Literal["dropped", "pooled"]


def small(num_selected: int, window: int, num_global: int, far: Far = "dropped") -> SparsePattern:
    return SparsePattern(num_selected, window, num_global, far, query_block=16, key_block=8, pool=2)


PATTERNS = [
    small(2, 8, 3),
    small(0, 0, 0),
    small(50, 0, 0),
    small(1, 20, 9, "pooled"),
    small(0, 8, 0, "pooled"),
]
OFFSETS = [[0, 61], [0, 0, 1, 41, 41, 44]]
PAIRS = [  # dropped and pooled with either offsets; a few of them quick
    (PATTERNS[0], OFFSETS[1]),
    pytest.param(PATTERNS[1], OFFSETS[0], marks=pytest.mark.slow),
    (PATTERNS[2], OFFSETS[0]),
    (PATTERNS[3], OFFSETS[1]),
    pytest.param(PATTERNS[4], OFFSETS[0], marks=pytest.mark.slow),
]
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's
TILE = TileConfig(16, 16, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with using("sparse", TILE), using("pooled", TILE), using("scores", TILE):
        yield


def draw(
    num_rows: int, device: torch.device, dtype: torch.dtype, width: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v in quarters: their scores are exact, so all forms choose the same."""
    qkv = (torch.randn(num_rows, 3, 2, width, device=device) * 4).round() / 4
    q_THd, k_THd, v_THd = qkv.to(dtype).unbind(dim=1)
    return q_THd, k_THd, v_THd


def as_offsets(offsets: list[int], device: torch.device) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int32, device=device)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("pattern", "offsets"), PAIRS, ids=str)
def test_forms_agree(
    impl: Impl,
    offsets: list[int],
    pattern: SparsePattern,
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    qkv, cu_seqlens = draw(offsets[-1], device, torch.float32), as_offsets(offsets, device)
    got = block_sparse_attention(*qkv, cu_seqlens, pattern, impl=impl)
    assert got.is_contiguous()
    assert_near(got, block_sparse_attention(*qkv, cu_seqlens, pattern, impl="reference"))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 16), (torch.float32, 12)])
def test_narrow_numbers_and_odd_widths(
    impl: Impl, dtype: torch.dtype, width: int, device: torch.device, assert_near: NearCheck
) -> None:
    qkv, cu_seqlens = draw(45, device, dtype, width), as_offsets([0, 45], device)
    got = block_sparse_attention(*qkv, cu_seqlens, PATTERNS[3], impl=impl)
    assert got.dtype == dtype
    assert_near(got, block_sparse_attention(*qkv, cu_seqlens, PATTERNS[3], impl="reference"))


@pytest.mark.parametrize("impl", FORMS)
def test_all_blocks_chosen_is_full_attention(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    qkv, cu_seqlens = draw(45, device, torch.float32), as_offsets([0, 29, 45], device)
    got = block_sparse_attention(*qkv, cu_seqlens, PATTERNS[2], impl=impl)
    assert_near(got, varlen_attention(*qkv, cu_seqlens, FULL, impl="reference"))


@pytest.mark.parametrize("impl", FORMS)
def test_far_spans_of_one_position_are_full_attention(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    qkv, cu_seqlens = draw(45, device, torch.float32), as_offsets([0, 29, 45], device)
    pattern = SparsePattern(1, 4, 0, "pooled", query_block=16, key_block=8, pool=1)
    got = block_sparse_attention(*qkv, cu_seqlens, pattern, impl=impl)
    assert_near(got, varlen_attention(*qkv, cu_seqlens, FULL, impl="reference"))


@pytest.mark.parametrize("impl", FORMS)
def test_the_block_with_the_needle_is_chosen(impl: Impl, device: torch.device) -> None:
    q = torch.zeros(96, 1, 16, device=device)
    k, v = torch.zeros_like(q), torch.zeros_like(q)
    q[3, 0, 0], k[85, 0, 0], v[85] = 100.0, 100.0, 1.0
    pattern = small(1, 0, 0)
    got = block_sparse_attention(q, k, v, as_offsets([0, 96], device), pattern, impl=impl)
    assert got[3].min() > 0.99
    assert got[50].max() < 0.1


def test_of_equal_blocks_the_earlier_ones_are_chosen(device: torch.device) -> None:
    q = torch.zeros(96, 1, 16, device=device)
    pattern = small(2, 0, 0)
    seen_IJ = seen_blocks(q, q, pattern)[0]
    assert seen_IJ[0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert seen_IJ[3].nonzero().flatten().tolist() == [0, 1, 6, 7]
    number = torch.arange(96.0, device=device).view(-1, 1, 1).expand(96, 1, 16).contiguous()
    got = block_sparse_attention(q, q, number, as_offsets([0, 96], device), pattern, impl="triton")
    assert got[50].tolist() == [[(7.5 + 55.5) / 2] * 16]  # means of 0 to 15 and of 48 to 63


def test_a_shift_of_all_keys_changes_no_choice() -> None:
    q, k, _ = draw(96, torch.device("cpu"), torch.float64)
    pattern = PATTERNS[0]
    assert torch.equal(seen_blocks(q, k, pattern), seen_blocks(q, k + 8.0, pattern))


def test_later_queries_choose_alone_as_with_the_others() -> None:
    q, k, _ = draw(96, torch.device("cpu"), torch.float64)
    whole = seen_blocks(q, k, PATTERNS[0])
    assert torch.equal(seen_blocks(q[32:], k, PATTERNS[0], first=32), whole[:, 2:])


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("pattern", "broken"), [(PATTERNS[0], torch.inf), (PATTERNS[3], torch.nan)], ids=str
)
def test_broken_values_stay_inside_their_sequence(
    impl: Impl, pattern: SparsePattern, broken: float, device: torch.device
) -> None:
    qkv, cu_seqlens = draw(30, device, torch.float32), as_offsets([0, 6, 23, 30], device)
    whole = block_sparse_attention(*qkv, cu_seqlens, pattern, impl=impl)
    for tensor in qkv:
        tensor[6] = broken
        tensor[22] = broken
    got = block_sparse_attention(*qkv, cu_seqlens, pattern, impl=impl)
    assert not got[6].isfinite().any()
    assert torch.equal(got[:6], whole[:6])
    assert torch.equal(got[23:], whole[23:])


@pytest.mark.parametrize("impl", FORMS)
def test_nothing_to_attend(impl: Impl, device: torch.device) -> None:
    qkv = draw(0, device, torch.float32)
    got = block_sparse_attention(*qkv, as_offsets([0, 0], device), PATTERNS[0], impl=impl)
    assert got.shape == (0, 2, 16)


@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[3]], ids=str)
def test_gradients_agree(pattern: SparsePattern, assert_near: NearCheck) -> None:
    q, k, v = leaves = [x.requires_grad_() for x in draw(45, torch.device("cpu"), torch.float64)]
    cu_seqlens, grads = as_offsets([0, 29, 45], torch.device("cpu")), []
    for impl in FORMS[:2]:
        out = block_sparse_attention(q, k, v, cu_seqlens, pattern, impl=impl)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert_near(got, want)


def test_impossible_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="from 0"):
        SparsePattern(num_selected=-1)
    with pytest.raises(ValueError, match="multiple of pool"):
        SparsePattern(key_block=64, pool=24)
