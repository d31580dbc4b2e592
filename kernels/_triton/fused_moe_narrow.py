"""Triton form of ``kernels.fused_moe`` for narrow layers: two launches, tokens to tokens.

Experts y[r, p] = down[e][:, p] (silu(gate[e][p] x[t]) * up[e][p] x[t])     row r of token t
Combine out[t] = sum_k w[t, k] sum_p y[rows[t, k], p]

A program owns one tile of the routing's map and a part of the hidden columns, 64 of them: its
weights are read at once, its hidden rows never leave the chip, and few tokens still keep many
multiprocessors busy.  The parts of a row are summed in ``Combine``, which beside a shared expert
is the end of that one's launch.

Bytes: E_hit * 3 D F of weights, 2 T D of tokens (the roofline), and 2 R D P of rows between both.
FLOPs: 6 R D F.

Measured on an H200 (2026-11-28, bfloat16, chained, in a CUDA graph): 5.4, 5.5, 5.6, 7.2 us for
T = 16, 64, 256, 1024 of base, .09 to .14 of the roofline, since a launch alone takes 2 us.

Tiles of 64 rows were the fastest throughout.  Fewer rows with the weights as the left operand are
right in the interpreter and wrong on the device (docs/log.md).

Deterministic: every sum has one order, and no atomic is used.  Nothing waits for the host.

Legend: R routed rows, D model, F expert hidden, P parts of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.chain import begin, is_chained
from kernels._triton.combine import launch_combine
from kernels._triton.numerics import dot
from kernels.moe_config import MIN_BLOCK, MoELaunch
from kernels.routing import Routing

PART = 64  # hidden columns of a program


@triton.jit
def _narrow_kernel(
    x_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    down_ptr: tl.tensor,
    out_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    begin(CHAINED)
    tile, part = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    first = tl.load(tile_row_ptr + tile)
    if expert >= 0:
        hidden_F = part * BLOCK_F + tl.arange(0, BLOCK_F)
        column_D = tl.arange(0, BLOCK_D)
        inside_FD = (hidden_F < F)[:, None] & (column_D < D)[None, :]
        gate_FD_ptr = gate_up_ptr + (expert * 2 * F + hidden_F)[:, None] * D + column_D[None, :]
        gate_FD = tl.load(gate_FD_ptr, mask=inside_FD, other=0.0)
        up_FD = tl.load(gate_FD_ptr + F * D, mask=inside_FD, other=0.0)
        inside_DF = (column_D < D)[:, None] & (hidden_F < F)[None, :]
        down_DF_ptr = down_ptr + (expert * D + column_D)[:, None] * F + hidden_F[None, :]
        down_DF = tl.load(down_DF_ptr, mask=inside_DF, other=0.0)
        end = tl.load(ends_ptr + expert)
        row_R = first + tl.arange(0, BLOCK_R)
        token_R = tl.load(tokens_ptr + tl.minimum(row_R, end - 1))  # others' rows are not stored
        x_RD_ptr = x_ptr + token_R.to(tl.int64)[:, None] * D + column_D[None, :]
        x_RD = tl.load(x_RD_ptr, mask=(column_D < D)[None, :], other=0.0)
        gate_RF = dot(x_RD, gate_FD.T, tl.zeros((BLOCK_R, BLOCK_F), tl.float32))
        up_RF = dot(x_RD, up_FD.T, tl.zeros((BLOCK_R, BLOCK_F), tl.float32))
        h_RF = (gate_RF * tl.sigmoid(gate_RF) * up_RF).to(x_RD.dtype)
        y_RD = dot(h_RF, down_DF.T, tl.zeros((BLOCK_R, BLOCK_D), tl.float32))
        place_R = row_R.to(tl.int64) * tl.num_programs(1) + part
        inside_RD = (row_R < end)[:, None] & (column_D < D)[None, :]
        out_RD_ptr = out_ptr + place_R[:, None] * D + column_D[None, :]
        tl.store(out_RD_ptr, y_RD.to(out_ptr.dtype.element_ty), mask=inside_RD)


def launch_rows(
    x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, routing: Routing, config: MoELaunch
) -> Tensor:
    """Return the parts of the outputs of the experts in expert order, [R, P, D], from a token on."""
    num_rows, (_, width, hidden) = routing.tokens_R.numel(), down_EDF.shape
    block_f = max(MIN_BLOCK, min(PART, triton.next_power_of_2(hidden)))
    num_parts = triton.cdiv(hidden, block_f)
    y_RPD = torch.empty(num_rows, num_parts, width, dtype=x_TD.dtype, device=x_TD.device)
    num_tiles = min(routing.tile_expert_M.numel(), num_rows)  # a used tile has a row
    chained = is_chained(config)
    _narrow_kernel[(num_tiles, num_parts)](
        x_TD,
        routing.tokens_R,
        gate_up_EGD,
        down_EDF,
        y_RPD,
        routing.ends_E,
        routing.tile_expert_M,
        routing.tile_row_M,
        D=width,
        F=hidden,
        CHAINED=chained,
        BLOCK_R=routing.block_rows,
        BLOCK_D=max(MIN_BLOCK, triton.next_power_of_2(width)),
        BLOCK_F=block_f,
        num_warps=8 if routing.block_rows > PART else 4,
        launch_pdl=chained,
    )
    return y_RPD


def launch(
    x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, routing: Routing, config: MoELaunch
) -> Tensor:
    """Run both on checked inputs."""
    if x_TD.numel() == 0:
        return torch.empty_like(x_TD)
    y_RPD = launch_rows(x_TD, gate_up_EGD, down_EDF, routing, config)
    return launch_combine(y_RPD, routing, config)
