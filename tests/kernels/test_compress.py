from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels.compress import num_pooled, pool_spans
from kernels.dispatch import Form, Impl

NearCheck = Callable[[Tensor, Tensor], None]
FORMS = get_args(Form)


@pytest.mark.parametrize("impl", FORMS)
def test_a_row_is_the_mean_of_its_span(impl: Impl, device: torch.device) -> None:
    x_THd = torch.arange(7.0, device=device).view(7, 1, 1).expand(7, 2, 3).contiguous()
    cu_seqlens = torch.tensor([0, 5, 5, 7], dtype=torch.int32, device=device)
    got = pool_spans(x_THd, cu_seqlens, 2, impl=impl)
    # sequence 0 at rows 0 to 2; 1 is empty, at 3; 2 at row 5 // 2 + 2
    assert got[:, 0, 0].tolist() == [0.5, 2.5, 4.0, 0.0, 5.5, 0.0]
    assert torch.equal(got, got[:, :1, :1].expand(-1, 2, 3))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("dtype", "span"), [(torch.float32, 1), (torch.float16, 5), (torch.float32, 16)]
)
@pytest.mark.parametrize("offsets", [[0, 0, 1, 18, 18, 60], [0, 3]], ids=str)
def test_forms_agree(
    impl: Impl,
    dtype: torch.dtype,
    span: int,
    offsets: list[int],
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    x_THd = torch.randn(offsets[-1], 3, 2, 12, device=device).to(dtype).unbind(dim=1)[1]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    got = pool_spans(x_THd, cu_seqlens, span, impl=impl)
    assert got.dtype == dtype
    assert len(got) == num_pooled(offsets[-1], len(offsets) - 1, span)
    assert_near(got, pool_spans(x_THd, cu_seqlens, span, impl="reference"))


@pytest.mark.parametrize("impl", FORMS)
def test_nothing_to_pool(impl: Impl, device: torch.device) -> None:
    x_THd, cu_seqlens = torch.zeros(0, 2, 4, device=device), torch.zeros(1, device=device)
    assert pool_spans(x_THd, cu_seqlens.int(), 4, impl=impl).shape == (0, 2, 4)


def test_far_rows_take_a_sixteenth() -> None:
    x_THd = torch.zeros(4096, 1, 4)
    pooled = pool_spans(x_THd, torch.tensor([0, 4096], dtype=torch.int32), 16)
    assert pooled.nbytes <= x_THd.nbytes / 16 * 1.01


def test_no_span_is_refused() -> None:
    with pytest.raises(ValueError, match="expected span"):
        pool_spans(torch.zeros(4, 1, 4), torch.tensor([0, 4], dtype=torch.int32), 0)
