from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Form, Impl
from kernels.permute import combine, combine_reference, permute
from kernels.routing import route

NearCheck = Callable[[Tensor, Tensor], None]
FORMS = get_args(Form)


@pytest.mark.parametrize("impl", FORMS)
def test_permute_takes_the_token_behind_each_row(impl: Impl, device: torch.device) -> None:
    x_TD = torch.randn(5, 300, device=device)
    tokens_R = torch.tensor([4, 0, 0, 2, 3, 1, 4], dtype=torch.int32, device=device)
    rows_RD = permute(x_TD, tokens_R, impl=impl)
    for row, token in enumerate(tokens_R.tolist()):
        assert torch.equal(rows_RD[row], x_TD[token])


def test_combine_reference_is_the_formula(assert_near: NearCheck) -> None:
    y_RD, weights_TK = torch.randn(6, 4).double(), torch.rand(3, 2).double()
    rows_TK = torch.tensor([[5, 1], [0, 2], [4, 3]], dtype=torch.int32)
    expected = [
        sum(float(weights_TK[t, k]) * y_RD[int(rows_TK[t, k])] for k in range(2)) for t in range(3)
    ]
    assert_near(combine_reference(y_RD, weights_TK, rows_TK), torch.stack(expected))  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_tokens", "width", "num_chosen"), [(0, 8, 2), (1, 3, 1), (41, 24, 3)])
def test_permute_then_combine_is_the_identity(
    impl: Impl,
    dtype: torch.dtype,
    num_tokens: int,
    width: int,
    num_chosen: int,
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    x_TD = torch.randn(num_tokens, width, device=device).to(dtype)
    logits_TE = torch.randn(num_tokens, 5, device=device)
    routing = route(logits_TE, torch.zeros(5, device=device), num_chosen)
    rows_RD = permute(x_TD, routing.tokens_R, impl=impl)
    out_TD = combine(rows_RD, routing.weights_TK, routing.rows_TK, impl=impl)
    assert out_TD.dtype == dtype
    assert_near(out_TD, x_TD)


@pytest.mark.parametrize("impl", FORMS)
def test_combine_keeps_a_nan_row_in_its_token(impl: Impl, device: torch.device) -> None:
    y_RD = torch.randn(8, 16, device=device)
    y_RD[3] = torch.nan
    rows_TK = torch.arange(8, dtype=torch.int32, device=device).view(4, 2)
    out_TD = combine(y_RD, torch.full((4, 2), 0.5, device=device), rows_TK, impl=impl)
    assert out_TD.isnan().any(dim=1).tolist() == [False, True, False, False]


def test_gradients_agree(assert_near: NearCheck) -> None:
    rows_TK = torch.randperm(10, dtype=torch.int32).view(5, 2)
    y_RD, weights_TK = leaves = [torch.randn(s, requires_grad=True) for s in ((10, 4), (5, 2))]
    grads = []
    for impl in FORMS[:2]:
        loss = combine(y_RD, weights_TK, rows_TK, impl=impl).square().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert_near(got, want)


def test_weights_of_another_dtype_are_refused() -> None:
    rows_TK = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="weights_TK: expected"):
        combine(torch.zeros(1, 4), torch.zeros(1, 1).half(), rows_TK)
