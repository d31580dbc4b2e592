"""Which form of an op runs, and the check of what an op is given.

Every op has three forms with one contract.  ``reference`` is the formula, computed in
float32 (float64 for float64 inputs).  ``torch`` is fast eager code for the CPU and for
training, differentiable by autograd.  ``triton`` is the inference form for CUDA; it is
imported only when it runs.

``TRIMOE_KERNELS=torch`` in the environment of a process takes Triton out of "auto" there: to
see whether a kernel is to blame, and what the kernels are worth.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import Final, Literal

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "torch", "triton"]
Form = Literal["reference", "torch", "triton"]
VARIABLE: Final = "TRIMOE_KERNELS"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def needs_grad(*tensors: Tensor) -> bool:
    """Return whether autograd records what happens to these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@cache
def environment_impl() -> Literal["auto", "torch"]:
    """Return what "auto" stands for in this process, read once from its environment.

    Raises:
        ValueError: The variable has another value.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value == "auto":
        return "auto"
    if value == "torch":
        return "torch"
    message = f"{VARIABLE}: expected auto or torch, got {value!r}; unset it for auto"
    raise ValueError(message)


def select_impl(impl: Impl, *tensors: Tensor) -> Form:
    """Return the form to run on these inputs.

    "auto" takes Triton on CUDA where no gradient is needed, else torch; torch everywhere if
    the environment says so (``environment_impl``).

    Raises:
        ValueError: Triton was asked for and cannot run on these inputs.
    """
    if impl == "auto":
        impl = environment_impl()
    if impl == "auto":
        on_cuda = all(tensor.is_cuda for tensor in tensors)
        return "triton" if on_cuda and not needs_grad(*tensors) else "torch"
    if impl == "triton":
        _demand_triton(*tensors)
    return impl


def _demand_triton(*tensors: Tensor) -> None:
    from triton import knobs  # noqa: PLC0415 - Triton is optional

    if needs_grad(*tensors):
        message = "impl='triton': expected no gradient, got requires_grad=True; use impl='torch'"
        raise ValueError(message)
    devices = {tensor.device.type for tensor in tensors}
    if devices != {"cuda"} and not knobs.runtime.interpret:
        message = f"impl='triton': expected cuda tensors, got {devices}; use impl='auto'"
        raise ValueError(message)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in TRITON_FLOATS:
            message = f"impl='triton': expected 16 or 32 bit floats, got {tensor.dtype}"
            raise ValueError(message)


def check(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    contiguous: bool = True,
) -> None:
    """Raise ValueError unless the tensor has this shape (None = any), dtype and layout."""
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes or (contiguous and not tensor.is_contiguous()):
        wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        layout = "contiguous " if contiguous else ""
        message = (
            f"{name}: expected {layout}{wanted} of {' or '.join(map(str, dtypes))}, "
            f"got {list(tensor.shape)} of {tensor.dtype}, strides {list(tensor.stride())}"
        )
        raise ValueError(message)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a reference computes in: at least float32."""
    return torch.promote_types(dtype, torch.float32)
