"""Gradients of the Triton form of ``kernels.fused_moe``: five launches.

With z = (gate x, up x), h = silu(z_gate) * z_up and w the routing weight of a row:

Inner   g[r] = down[e]^T dout[t]    dw[r] = g . h    dz[r] = w g dh/dz    also w h, for Down
Tokens  dx_r[r] = gate_up[e]^T dz[r],  then  dx[t] = sum_k dx_r[rows[t, k]]
Up      dgate_up[e] = sum over rows of e: dz[r] x[t]^T
Down    ddown[e] = sum over rows of e: dout[t] (w h)[r]^T

z is computed again from x, so that the forward keeps nothing but its inputs.

Bytes: weights read twice and their gradients written once, 9 E D F of them in all, and 6 R F,
6 R D of rows.  FLOPs: 18 R D F, 2 R D F * 2 of which compute z again.

Deterministic: a column block's part of dw is stored and summed after.  Nothing waits for the host.

Source: Tan et al. 2024 (arXiv:2403.08245) for gathers inside grouped products.

Legend: R routed rows, D model, F expert hidden, N output columns, M output rows, K inner.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.combine import sum_choices
from kernels._triton.numerics import dot
from kernels.routing import Routing

BLOCK = 64  # columns and inner columns
WIDE_BLOCK = 128  # of a weight's gradient, each way


@triton.jit
def _tile(
    expert_ptr: tl.tensor,
    row_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile: tl.tensor,
    BLOCK_R: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the expert of a tile, its rows, and which of them are its own."""
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    row_R = tl.load(row_ptr + tile).to(tl.int64) + tl.arange(0, BLOCK_R)
    return expert, row_R, row_R < tl.load(ends_ptr + expert)


@triton.jit
def _inner_grad_kernel(
    x_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    down_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    dz_ptr: tl.tensor,
    wh_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    D: tl.tensor,
    F: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    if tl.load(tile_expert_ptr + tl.program_id(0)) < 0:
        return
    expert, row_R, inside_R = _tile(
        tile_expert_ptr, tile_row_ptr, ends_ptr, tl.program_id(0), BLOCK_R
    )
    token_R = tl.load(tokens_ptr + row_R, mask=inside_R, other=0).to(tl.int64)
    column_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = column_F < F
    gate_RF = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    up_RF = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    g_RF = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    gate_up_ptr += expert * 2 * F * D
    down_ptr += expert * F * D
    for start in range(0, D, BLOCK_D):
        inner_D = start + tl.arange(0, BLOCK_D)
        inside_RD = inside_R[:, None] & (inner_D < D)[None, :]
        inside_FD = inside_F[:, None] & (inner_D < D)[None, :]
        row_RD = token_R[:, None] * D + inner_D[None, :]
        x_RD = tl.load(x_ptr + row_RD, mask=inside_RD, other=0.0)
        grad_RD = tl.load(grad_ptr + row_RD, mask=inside_RD, other=0.0)
        column_FD = column_F[:, None] * D + inner_D[None, :]
        w_FD = tl.load(gate_up_ptr + column_FD, mask=inside_FD, other=0.0)
        gate_RF = dot(x_RD, w_FD.T, gate_RF)
        w_FD = tl.load(gate_up_ptr + F * D + column_FD, mask=inside_FD, other=0.0)
        up_RF = dot(x_RD, w_FD.T, up_RF)
        down_DF = tl.load(
            down_ptr + inner_D[:, None] * F + column_F[None, :],
            mask=(inner_D < D)[:, None] & inside_F[None, :],
            other=0.0,
        )
        g_RF = dot(grad_RD, down_DF, g_RF)
    sigmoid_RF = tl.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    h_RF = silu_RF * up_RF
    dw_ptr += row_R * tl.num_programs(1) + tl.program_id(1)
    tl.store(dw_ptr, tl.sum(g_RF * h_RF, axis=1), mask=inside_R)
    weight_R1 = tl.load(weight_ptr + row_R, mask=inside_R, other=0.0)[:, None]
    g_RF *= weight_R1
    dgate_RF = g_RF * up_RF * (sigmoid_RF + silu_RF * (1.0 - sigmoid_RF))
    inside_RF = inside_R[:, None] & inside_F[None, :]
    dz_RF = dz_ptr + row_R[:, None] * 2 * F + column_F[None, :]
    tl.store(dz_RF, dgate_RF.to(dz_ptr.dtype.element_ty), mask=inside_RF)
    tl.store(dz_RF + F, (g_RF * silu_RF).to(dz_ptr.dtype.element_ty), mask=inside_RF)
    wh_RF = wh_ptr + row_R[:, None] * F + column_F[None, :]
    tl.store(wh_RF, (weight_R1 * h_RF).to(wh_ptr.dtype.element_ty), mask=inside_RF)


@triton.jit
def _row_grad_kernel(
    dz_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    if tl.load(tile_expert_ptr + tl.program_id(0)) < 0:
        return
    expert, row_R, inside_R = _tile(
        tile_expert_ptr, tile_row_ptr, ends_ptr, tl.program_id(0), BLOCK_R
    )
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < N
    sum_RN = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    weight_ptr += expert * K * N
    for start in range(0, K, BLOCK_K):
        inner_K = start + tl.arange(0, BLOCK_K)
        inside_K = inner_K < K
        dz_RK = tl.load(
            dz_ptr + row_R[:, None] * K + inner_K[None, :],
            mask=inside_R[:, None] & inside_K[None, :],
            other=0.0,
        )
        w_KN = tl.load(
            weight_ptr + inner_K[:, None] * N + column_N[None, :],
            mask=inside_K[:, None] & inside_N[None, :],
            other=0.0,
        )
        sum_RN = dot(dz_RK, w_KN, sum_RN)
    out_RN = out_ptr + row_R[:, None] * N + column_N[None, :]
    inside_RN = inside_R[:, None] & inside_N[None, :]
    tl.store(out_RN, sum_RN.to(out_ptr.dtype.element_ty), mask=inside_RN)


@triton.jit
def _weight_grad_kernel(
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    load_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    LEFT_GATHERED: tl.constexpr,  # the left rows are of tokens, else the right ones
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    expert = tl.program_id(2).to(tl.int64)
    end = tl.load(ends_ptr + expert)
    column_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_M, inside_N = column_M < M, column_N < N
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(end - tl.load(load_ptr + expert), end, BLOCK_K):
        row_K = start + tl.arange(0, BLOCK_K)
        inside_K = row_K < end
        token_K = tl.load(tokens_ptr + row_K, mask=inside_K, other=0).to(tl.int64)
        row_K = row_K.to(tl.int64)
        left_K = token_K if LEFT_GATHERED else row_K
        right_K = row_K if LEFT_GATHERED else token_K
        left_KM = tl.load(
            left_ptr + left_K[:, None] * M + column_M[None, :],
            mask=inside_K[:, None] & inside_M[None, :],
            other=0.0,
        )
        right_KN = tl.load(
            right_ptr + right_K[:, None] * N + column_N[None, :],
            mask=inside_K[:, None] & inside_N[None, :],
            other=0.0,
        )
        sum_MN = dot(left_KM.T, right_KN, sum_MN)
    out_MN = out_ptr + expert * M * N + column_M.to(tl.int64)[:, None] * N + column_N[None, :]
    inside_MN = inside_M[:, None] & inside_N[None, :]
    tl.store(out_MN, sum_MN.to(out_ptr.dtype.element_ty), mask=inside_MN)


def _block(size: int, most: int) -> int:
    return max(16, min(most, int(triton.next_power_of_2(size))))


def _weight_grad(
    left: Tensor, right: Tensor, routing: Routing, out_EMN: Tensor, *, left_gathered: bool
) -> None:
    num_experts, m, n = out_EMN.shape
    most = WIDE_BLOCK * 2 // left.element_size()
    block_m, block_n = _block(m, most), _block(n, most)
    _weight_grad_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n), num_experts)](
        left,
        right,
        routing.tokens_R,
        routing.load_E,
        routing.ends_E,
        out_EMN,
        m,
        n,
        LEFT_GATHERED=left_gathered,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK * 2 // left.element_size(),
        num_warps=8,
        num_stages=3,
    )


def launch(
    grad_TD: Tensor, x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, routing: Routing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate_up, down and the routing's weights, on checked inputs."""
    (num_rows, d), f = (routing.tokens_R.numel(), x_TD.shape[1]), down_EDF.shape[2]
    dgate_up_EGD, ddown_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
    if num_rows == 0:
        zeros = (torch.zeros_like(x_TD), dgate_up_EGD.zero_(), ddown_EDF.zero_())
        return *zeros, torch.zeros_like(routing.weights_TK)
    rows = routing.rows_TK.flatten()
    weights = routing.weights_TK.flatten()
    weight_R = weights.new_zeros(num_rows).index_add_(0, rows, weights)  # idle tokens add 0
    most = BLOCK * 2 // x_TD.element_size()
    block_f, block_d, tiles = _block(f, most), _block(d, most), routing.tile_expert_M.numel()
    blocks_f = triton.cdiv(f, block_f)
    dz_RG, wh_RF = x_TD.new_empty(num_rows, 2 * f), x_TD.new_empty(num_rows, f)
    dw_RB = weights.new_empty(num_rows, blocks_f)
    order = (routing.ends_E, routing.tile_expert_M, routing.tile_row_M)
    cut = {"BLOCK_R": routing.block_rows, "num_warps": 8 if routing.block_rows > 32 else 4}
    _inner_grad_kernel[(tiles, blocks_f)](
        *(x_TD, grad_TD, gate_up_EGD, down_EDF, routing.tokens_R, weight_R, *order),
        *(dz_RG, wh_RF, dw_RB, d, f),
        BLOCK_F=block_f,
        BLOCK_D=block_d,
        num_stages=3,
        **cut,
    )
    _weight_grad(dz_RG, x_TD, routing, dgate_up_EGD, left_gathered=False)
    _weight_grad(grad_TD, wh_RF, routing, ddown_EDF, left_gathered=True)
    dx_RD, block_n = x_TD.new_empty(num_rows, d), _block(d, 2 * most)
    _row_grad_kernel[(tiles, triton.cdiv(d, block_n))](
        *(dz_RG, gate_up_EGD, *order, dx_RD, d, 2 * f),
        BLOCK_N=block_n,
        BLOCK_K=_block(2 * f, most),
        num_stages=3,
        **cut,
    )
    token_T1 = torch.arange(len(x_TD), device=x_TD.device).unsqueeze(1)
    is_own_TK = routing.tokens_R[rows].view_as(routing.rows_TK) == token_T1  # idle ones own no row
    is_own_TK &= routing.rows_TK < routing.ends_E[-1]
    dx_TD = sum_choices(dx_RD, is_own_TK.to(weights.dtype), routing.rows_TK, chained=False)
    dx_TD.masked_fill_(~is_own_TK.any(dim=1, keepdim=True), 0.0)  # rows that nobody wrote
    dw_TK = dw_RB.sum(dim=1)[rows].view_as(routing.rows_TK)
    return dx_TD, dgate_up_EGD, ddown_EDF, dw_TK.masked_fill(~is_own_TK, 0.0)
