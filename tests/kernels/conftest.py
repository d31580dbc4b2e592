"""Kernel tests run where the machine allows: on CUDA, else in Triton's interpreter.

The interpreter is chosen by the environment before any kernel module is imported.
It multiplies bfloat16 wrongly, so interpreted tests use 16 and 32 bit IEEE floats.
"""

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter  # noqa: E402 - after the environment is set

# Allowed error beside values of unit variance, absolute and relative: some ten roundings of the dtype.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
NearCheck = Callable[[Tensor, Tensor], None]


@pytest.fixture
def assert_near() -> NearCheck:
    """Compare with the tolerance of the first tensor's dtype; NaN equals NaN."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        tolerance = TOLERANCE[actual.dtype]
        wide = expected.to(device=actual.device, dtype=torch.float64)
        torch.testing.assert_close(
            actual.double(), wide, atol=tolerance, rtol=tolerance, equal_nan=True
        )

    return check


@pytest.fixture
def device() -> torch.device:
    """Where Triton forms run: CUDA tensors, or CPU tensors interpreted."""
    return torch.device("cuda" if ON_CUDA else "cpu")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20261123)


@pytest.fixture(autouse=True)
def interpreted_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the interpreter quiet about NaN, and work beside numpy 2.4.

    The loop bound fix is that of triton-lang/triton#9172, newer than Triton 3.6.
    """
    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
    with np.errstate(all="ignore"):
        yield
