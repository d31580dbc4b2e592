"""Triton form of ``kernels.grouped_ffn``: two launches of one grouped product.

The first multiplies by gate and up and applies SwiGLU on the accumulators, the second
multiplies by down.  A program owns one tile of the routing's map and a block of output
columns; programs of unused tiles return at once.

Legend: R rows of a tile, N output columns, K inner columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.numerics import dot
from kernels.routing import Routing

MAX_BLOCK_N = 64  # with gate and up: 2 x 64 x 64 accumulators, 64 registers a thread at 4 warps
MAX_BLOCK_K = 64
MIN_BLOCK = 16  # smallest dimension of a matrix product


@triton.jit
def _grouped_product_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,  # weights hold 2 N rows, gate then up; out = silu(gate) * up
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    row_R = tl.load(tile_row_ptr + tile).to(tl.int64) + tl.arange(0, BLOCK_R)
    inside_R = row_R < tl.load(ends_ptr + expert)
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < N
    inner_K = tl.arange(0, BLOCK_K)
    x_RK = x_ptr + row_R[:, None] * K + inner_K[None, :]
    weight_ptr += expert * N * K * (2 if GATED else 1)
    weight_NK = weight_ptr + column_N[:, None] * K + inner_K[None, :]
    sum_RN = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    up_RN = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside_K = start + inner_K < K
        inside_NK = inside_N[:, None] & inside_K[None, :]
        x = tl.load(x_RK + start, mask=inside_R[:, None] & inside_K[None, :], other=0.0)
        weight = tl.load(weight_NK + start, mask=inside_NK, other=0.0)
        sum_RN = dot(x, weight.T, sum_RN)
        if GATED:
            up = tl.load(weight_NK + N * K + start, mask=inside_NK, other=0.0)
            up_RN = dot(x, up.T, up_RN)
    if GATED:
        sum_RN = sum_RN * tl.sigmoid(sum_RN) * up_RN
    out_RN = out_ptr + row_R[:, None] * N + column_N[None, :]
    inside_RN = inside_R[:, None] & inside_N[None, :]
    tl.store(out_RN, sum_RN.to(out_ptr.dtype.element_ty), mask=inside_RN)


def _grouped_product(x_RK: Tensor, weight: Tensor, routing: Routing, *, gated: bool) -> Tensor:
    """Return x times each row's own expert matrix, transposed, [R, N]."""
    num_rows, inner = x_RK.shape
    width = weight.shape[1] // (2 if gated else 1)
    out_RN = torch.empty(num_rows, width, dtype=x_RK.dtype, device=x_RK.device)
    max_block_n = MAX_BLOCK_N * 2 // x_RK.element_size()  # float32 takes three products
    block_n = max(MIN_BLOCK, min(max_block_n, triton.next_power_of_2(width)))
    block_k = max(MIN_BLOCK, min(MAX_BLOCK_K, triton.next_power_of_2(inner)))
    _grouped_product_kernel[(routing.tile_expert_M.numel(), triton.cdiv(width, block_n))](
        x_RK,
        weight,
        out_RN,
        routing.ends_E,
        routing.tile_expert_M,
        routing.tile_row_M,
        N=width,
        K=inner,
        GATED=gated,
        BLOCK_R=routing.block_rows,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4 if routing.block_rows * x_RK.element_size() <= 128 else 8,
        num_stages=3,
    )
    return out_RN


def launch(x_RD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, routing: Routing) -> Tensor:
    """Run both products on checked inputs."""
    if x_RD.numel() == 0:
        return torch.empty_like(x_RD)
    hidden_RF = _grouped_product(x_RD, gate_up_EGD, routing, gated=True)
    return _grouped_product(hidden_RF, down_EDF, routing, gated=False)
