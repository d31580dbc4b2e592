import pytest
import torch
from triton import knobs

from kernels.dispatch import check, needs_grad, select_impl

CPU = torch.zeros(2)


def test_auto_on_cpu_is_torch() -> None:
    assert select_impl("auto", CPU) == "torch"


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_named_form_is_taken(impl: str) -> None:
    assert select_impl(impl, CPU) == impl  # type: ignore[arg-type]


def test_triton_refuses_a_gradient() -> None:
    with pytest.raises(ValueError, match="expected no gradient"):
        select_impl("triton", CPU.clone().requires_grad_())


def test_triton_takes_a_parameter_when_no_gradient_is_recorded() -> None:
    parameter = CPU.clone().requires_grad_()
    with torch.no_grad(), knobs.runtime.scope():
        knobs.runtime.interpret = True
        assert not needs_grad(parameter)
        assert select_impl("triton", parameter) == "triton"


def test_triton_refuses_the_cpu_outside_the_interpreter() -> None:
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        with pytest.raises(ValueError, match="expected cuda tensors"):
            select_impl("triton", CPU)


def test_triton_refuses_float64() -> None:
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        with pytest.raises(ValueError, match="16 or 32 bit"):
            select_impl("triton", CPU.double())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 4), r"expected contiguous \[any, 5\]"),
        (torch.zeros(3, 5, dtype=torch.int32), "of torch.float32, got"),
        (torch.zeros(5, 3).T, "strides"),
        (torch.zeros(5), r"got \[5\]"),
    ],
)
def test_check_names_what_was_expected_and_what_came(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check("x", tensor, (None, 5), torch.float32)
