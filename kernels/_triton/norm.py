"""Triton form of ``kernels.norm``: one read of each input, one write of each output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 4096  # 32 float32 values per thread at 4 warps


@triton.jit(do_not_specialize=["num_rows"])
def _add_rmsnorm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    summed_ptr: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_D = tl.arange(0, BLOCK_D)
    inside_TD = (row_T < num_rows)[:, None] & (column_D < D)[None, :]
    offset_TD = row_T[:, None] * D + column_D[None, :]
    sum_TD = tl.load(x_ptr + offset_TD, mask=inside_TD, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        sum_TD += tl.load(residual_ptr + offset_TD, mask=inside_TD, other=0.0).to(tl.float32)
        rounded_TD = sum_TD.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + offset_TD, rounded_TD, mask=inside_TD)
        sum_TD = rounded_TD.to(tl.float32)
    weight_D = tl.load(weight_ptr + column_D, mask=column_D < D, other=0.0).to(tl.float32)
    scale_T = tl.rsqrt(tl.sum(sum_TD * sum_TD, axis=1) / D + eps)
    normed_TD = sum_TD * scale_T[:, None] * weight_D[None, :]
    tl.store(normed_ptr + offset_TD, normed_TD.to(normed_ptr.dtype.element_ty), mask=inside_TD)


def launch(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Run the kernel on checked inputs."""
    num_rows, width = x_TD.shape
    normed_TD = torch.empty_like(x_TD)
    summed_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    if num_rows == 0:
        return normed_TD, summed_TD
    block_d = triton.next_power_of_2(width)
    block_t = max(1, min(16, TILE_ELEMENTS // block_d))
    _add_rmsnorm_kernel[(triton.cdiv(num_rows, block_t),)](
        x_TD,
        x_TD if residual_TD is None else residual_TD,
        weight_D,
        normed_TD,
        summed_TD,
        num_rows,
        eps,
        D=width,
        HAS_RESIDUAL=residual_TD is not None,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=4 if block_d <= TILE_ELEMENTS else 8,
    )
    return normed_TD, summed_TD
