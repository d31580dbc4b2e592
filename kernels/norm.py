"""Residual addition and root-mean-square norm in one op.

Covered: any number of rows, weight of the row width.  Not covered: bias, mean removal.

Legend: T tokens, D model.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import FLOATS, Impl, check, compute_dtype, select_impl


def add_rmsnorm(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the normalised sum of branch and residual, and the sum.

        s = x + residual        normed = s / sqrt(mean(s^2) + eps) * weight

    Args:
        x_TD: Branch output, float, contiguous.
        residual_TD: Same shape and dtype, or None for no residual (then s = x, unchanged).
        weight_D: Gain, float.
        eps: Added to the mean square.
        impl: Form to run.

    Returns:
        (normed, summed), each [T, D] in the dtype of ``x_TD``; s is rounded to that dtype
        before it is normalised.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Source:
        Zhang and Sennrich 2019, eq. 4 (arXiv:1910.07467).
    """
    check("x_TD", x_TD, (None, weight_D.numel()), FLOATS)
    check("weight_D", weight_D, (None,), FLOATS)
    if residual_TD is not None:
        check("residual_TD", residual_TD, x_TD.shape, x_TD.dtype)
    inputs = [x_TD, weight_D] if residual_TD is None else [x_TD, weight_D, residual_TD]
    form = select_impl(impl, *inputs)
    if form == "triton":
        from kernels._triton.norm import launch  # noqa: PLC0415 - Triton is optional

        return launch(x_TD, residual_TD, weight_D, eps)
    if form == "torch":
        return _add_rmsnorm_torch(x_TD, residual_TD, weight_D, eps)
    return add_rmsnorm_reference(x_TD, residual_TD, weight_D, eps)


def add_rmsnorm_reference(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The formula."""
    summed_TD = x_TD if residual_TD is None else x_TD + residual_TD
    wide_TD = summed_TD.to(compute_dtype(x_TD.dtype))
    scale_T1 = torch.rsqrt(wide_TD.square().mean(dim=1, keepdim=True) + eps)
    return (wide_TD * scale_T1 * weight_D).to(x_TD.dtype), summed_TD


def _add_rmsnorm_torch(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed_TD = x_TD if residual_TD is None else x_TD + residual_TD
    normed_TD = functional.rms_norm(summed_TD, weight_D.shape, weight_D.to(x_TD.dtype), eps)
    return normed_TD, summed_TD
