"""Triton form of ``kernels.compress``: a program for each pooled row and some of its columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.tiles import find_tile
from kernels.compress import num_pooled

BLOCK_COLUMNS = 1024


@triton.jit(do_not_specialize=["num_sequences", "num_halvings"])
def _pool_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    num_sequences: tl.tensor,
    num_halvings: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    slot = tl.program_id(0)
    _, start, end, tile = find_tile(slot, cu_ptr, num_sequences, num_halvings, SPAN)
    first = start + tile * SPAN
    count = tl.minimum(end - first, SPAN)
    column_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    each_S = tl.arange(0, BLOCK_SPAN)
    inside_C = column_C < H * D
    offset_C = (column_C // D) * stride_h + column_C % D
    x_SC = tl.load(
        x_ptr + first.to(tl.int64) * stride_t + each_S[:, None] * stride_t + offset_C[None, :],
        mask=(each_S < count)[:, None] & inside_C[None, :],
        other=0.0,
    )
    sum_C = tl.sum(x_SC.to(tl.float32), axis=0)
    mean_C = tl.div_rn(sum_C, tl.maximum(count, 1).to(tl.float32))
    out_C = mean_C.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + slot.to(tl.int64) * (H * D) + column_C, out_C, mask=inside_C)


def launch(x_THd: Tensor, cu_seqlens: Tensor, span: int) -> Tensor:
    """Run the kernel on checked inputs."""
    num_rows, num_heads, width = x_THd.shape
    num_sequences = cu_seqlens.numel() - 1
    rows = num_pooled(num_rows, num_sequences, span)
    out_PHd = torch.empty(rows, num_heads, width, dtype=x_THd.dtype, device=x_THd.device)
    if out_PHd.numel() == 0:
        return out_PHd
    block_c = min(BLOCK_COLUMNS, triton.next_power_of_2(num_heads * width))
    _pool_kernel[(rows, triton.cdiv(num_heads * width, block_c))](
        x_THd,
        out_PHd,
        cu_seqlens,
        num_sequences,
        num_sequences.bit_length(),
        *x_THd.stride()[:2],
        H=num_heads,
        D=width,
        SPAN=span,
        BLOCK_SPAN=triton.next_power_of_2(span),
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out_PHd
