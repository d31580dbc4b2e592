"""Triton forms of ``kernels.permute``: one read and one write of every row.

Legend: B rows of a block, D columns of a block, K chosen experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ELEMENTS = 2048
MAX_BLOCK_D = 256


@triton.jit(do_not_specialize=["num_rows"])
def _permute_kernel(
    x_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row_B = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token_B = tl.load(tokens_ptr + row_B, mask=row_B < num_rows, other=0).to(tl.int64)
    inside_BD = (row_B < num_rows)[:, None] & (column_D < D)[None, :]
    x_BD = tl.load(x_ptr + token_B[:, None] * D + column_D[None, :], mask=inside_BD, other=0.0)
    tl.store(out_ptr + row_B[:, None] * D + column_D[None, :], x_BD, mask=inside_BD)


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    y_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    token_B = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_B = token_B < num_tokens
    inside_BD = inside_B[:, None] & (column_D < D)[None, :]
    sum_BD = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        row_B = tl.load(rows_ptr + token_B * K + k, mask=inside_B, other=0).to(tl.int64)
        weight_B = tl.load(weights_ptr + token_B * K + k, mask=inside_B, other=0.0)
        offset_BD = row_B[:, None] * D + column_D[None, :]
        y_BD = tl.load(y_ptr + offset_BD, mask=inside_BD, other=0.0)
        sum_BD += weight_B[:, None] * y_BD.to(tl.float32)
    offset_BD = token_B[:, None] * D + column_D[None, :]
    tl.store(out_ptr + offset_BD, sum_BD.to(out_ptr.dtype.element_ty), mask=inside_BD)


def _blocks(width: int) -> tuple[int, int]:
    """Return rows and columns of a block."""
    block_d = min(triton.next_power_of_2(width), MAX_BLOCK_D)
    return BLOCK_ELEMENTS // block_d, block_d


def launch_permute(x_TD: Tensor, tokens_R: Tensor) -> Tensor:
    """Run the gather on checked inputs."""
    num_rows, width = tokens_R.numel(), x_TD.shape[1]
    out_RD = x_TD.new_empty(num_rows, width)
    if out_RD.numel() == 0:
        return out_RD
    block_b, block_d = _blocks(width)
    grid = (triton.cdiv(num_rows, block_b), triton.cdiv(width, block_d))
    _permute_kernel[grid](
        x_TD, tokens_R, out_RD, num_rows, D=width, BLOCK_B=block_b, BLOCK_D=block_d
    )
    return out_RD


def launch_combine(y_RD: Tensor, weights_TK: Tensor, rows_TK: Tensor) -> Tensor:
    """Run the weighted gather on checked inputs."""
    (num_tokens, num_chosen), width = rows_TK.shape, y_RD.shape[1]
    out_TD = torch.empty(num_tokens, width, dtype=y_RD.dtype, device=y_RD.device)
    if out_TD.numel() == 0:
        return out_TD
    block_b, block_d = _blocks(width)
    grid = (triton.cdiv(num_tokens, block_b), triton.cdiv(width, block_d))
    _combine_kernel[grid](
        y_RD,
        weights_TK,
        rows_TK,
        out_TD,
        num_tokens,
        D=width,
        K=num_chosen,
        BLOCK_B=block_b,
        BLOCK_D=block_d,
    )
    return out_TD
