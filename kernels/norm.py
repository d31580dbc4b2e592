"""Residual addition and root-mean-square norm in one op, quantised to 8 bits where asked.

    bytes   4 T D w + D w          w bytes of a value: branch and residual in, norm and sum out
            3 T D w + T D + T D / 32 + D w, quantised
    FLOPs   none on matrix units

Each form gives the same bits each time; a row does not depend on the others.

Covered: any number of rows, weight of the row width.  Not covered: bias, mean removal.

Legend: T tokens, D model, S runs of 128 columns with a scale of their own.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import FLOATS, Impl, check, compute_dtype, select_impl

SCALED_COLUMNS = 128  # that share a scale: DeepSeek-V3, arXiv:2412.19437, section 3.3.2
E4M3_MAX = 448.0  # largest number of float8_e4m3fn


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
    inputs = _checked(x_TD, residual_TD, weight_D)
    form = select_impl(impl, *inputs)
    if form == "triton":
        from kernels._triton.norm import launch  # noqa: PLC0415 - Triton is optional

        normed_TD, _, summed_TD = launch(x_TD, residual_TD, weight_D, eps)
        return normed_TD, summed_TD
    if form == "torch":
        return _add_rmsnorm_torch(x_TD, residual_TD, weight_D, eps)
    return add_rmsnorm_reference(x_TD, residual_TD, weight_D, eps)


def add_rmsnorm_fp8(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what ``add_rmsnorm`` does and quantise the norm by runs of 128 columns.

        scale = max |normed| / 448 of a run (1 if all are 0)        quantised = normed / scale

    Args:
        x_TD: As in ``add_rmsnorm``, and so are the others; the width is a multiple of 128.
        residual_TD: Same shape and dtype, or None.
        weight_D: Gain.
        eps: Added to the mean square.
        impl: Form to run.

    Returns:
        (quantised [T, D] float8_e4m3fn, scale [T, S] float32, summed [T, D]); no gradient.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Source:
        DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
    """
    inputs = _checked(x_TD, residual_TD, weight_D)
    if x_TD.shape[1] % SCALED_COLUMNS:
        message = f"x_TD: expected a multiple of {SCALED_COLUMNS} columns, got {x_TD.shape[1]}"
        raise ValueError(message)
    if select_impl(impl, *inputs) == "triton":
        from kernels._triton.norm import launch  # noqa: PLC0415 - Triton is optional

        return launch(x_TD, residual_TD, weight_D, eps, is_quantised=True)
    summed_TD = x_TD if residual_TD is None else x_TD + residual_TD
    wide_TD = summed_TD.detach().float()
    scale_T1 = torch.rsqrt(wide_TD.square().mean(dim=1, keepdim=True) + eps)
    run_TSC = (wide_TD * scale_T1 * weight_D.detach()).unflatten(1, (-1, SCALED_COLUMNS))
    most_TS1 = run_TSC.abs().amax(dim=2, keepdim=True)
    step_TS1 = torch.where(most_TS1 > 0.0, most_TS1 / E4M3_MAX, 1.0)
    quantised_TD = (run_TSC / step_TS1).clamp(-E4M3_MAX, E4M3_MAX).flatten(1)
    return quantised_TD.to(torch.float8_e4m3fn), step_TS1.squeeze(2), summed_TD


def _checked(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor) -> list[Tensor]:
    """Return the tensors that are given."""
    check("x_TD", x_TD, (None, weight_D.numel()), FLOATS)
    check("weight_D", weight_D, (None,), FLOATS)
    if residual_TD is None:
        return [x_TD, weight_D]
    check("residual_TD", residual_TD, x_TD.shape, x_TD.dtype)
    return [x_TD, weight_D, residual_TD]


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
