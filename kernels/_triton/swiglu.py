"""Triton forms of ``kernels.swiglu``: a whole narrow layer, or gate and up of a wide one.

Legend: T tokens of a tile, D model, F hidden columns of a tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.numerics import dot

MIN_BLOCK = 16  # smallest dimension of a matrix product
NARROW_T, NARROW_F = 64, 64  # tokens and hidden columns of a tile: a warp group's product
MANY_TILES = 264  # twice the multiprocessors of an H200


class _Tile(NamedTuple):
    """Tokens, hidden columns, inner columns, warps and stages of a tile of gate and up."""

    t: int
    f: int
    d: int
    num_warps: int
    num_stages: int


LARGE, SMALL, FLOAT32 = _Tile(128, 64, 64, 8, 4), _Tile(64, 32, 64, 4, 4), _Tile(64, 32, 32, 8, 3)


@triton.jit
def _gated(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["num_tokens", "scale"])
def _swiglu_kernel(
    x_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    down_ptr: tl.tensor,
    addend_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    scale: tl.tensor,
    HAS_ADDEND: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_D = tl.arange(0, BLOCK_D)
    inside_TD = (token_T < num_tokens)[:, None] & (column_D < D)[None, :]
    offset_TD = token_T.to(tl.int64)[:, None] * D + column_D[None, :]
    x_TD = tl.load(x_ptr + offset_TD, mask=inside_TD, other=0.0)
    sum_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, F, BLOCK_F):
        hidden_F = start + tl.arange(0, BLOCK_F)
        inside_FD = (hidden_F < F)[:, None] & (column_D < D)[None, :]
        weight_FD = gate_up_ptr + hidden_F[:, None] * D + column_D[None, :]
        gate_FD = tl.load(weight_FD, mask=inside_FD, other=0.0)
        up_FD = tl.load(weight_FD + F * D, mask=inside_FD, other=0.0)
        gate_TF = dot(x_TD, gate_FD.T, tl.zeros((BLOCK_T, BLOCK_F), tl.float32))
        up_TF = dot(x_TD, up_FD.T, tl.zeros((BLOCK_T, BLOCK_F), tl.float32))
        hidden_TF = _gated(gate_TF, up_TF).to(x_TD.dtype)
        down_DF = down_ptr + column_D[:, None] * F + hidden_F[None, :]
        inside_DF = (column_D < D)[:, None] & (hidden_F < F)[None, :]
        sum_TD = dot(hidden_TF, tl.load(down_DF, mask=inside_DF, other=0.0).T, sum_TD)
    if HAS_ADDEND:
        addend_TD = tl.load(addend_ptr + offset_TD, mask=inside_TD, other=0.0)
        sum_TD += scale * addend_TD.to(tl.float32)
    tl.store(out_ptr + offset_TD, sum_TD.to(out_ptr.dtype.element_ty), mask=inside_TD)


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up_kernel(
    x_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    num_tokens: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    token_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    hidden_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_T, inside_F = token_T < num_tokens, hidden_F < F
    column_D = tl.arange(0, BLOCK_D)
    x_TD = x_ptr + token_T.to(tl.int64)[:, None] * D + column_D[None, :]
    gate_FD = gate_up_ptr + hidden_F.to(tl.int64)[:, None] * D + column_D[None, :]
    gate_TF = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    up_TF = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside_D = start + column_D < D
        inside_FD = inside_F[:, None] & inside_D[None, :]
        x = tl.load(x_TD + start, mask=inside_T[:, None] & inside_D[None, :], other=0.0)
        gate = tl.load(gate_FD + start, mask=inside_FD, other=0.0)
        up = tl.load(gate_FD + F * D + start, mask=inside_FD, other=0.0)
        gate_TF = dot(x, gate.T, gate_TF)
        up_TF = dot(x, up.T, up_TF)
    out_TF = hidden_ptr + token_T.to(tl.int64)[:, None] * F + hidden_F[None, :]
    inside_TF = inside_T[:, None] & inside_F[None, :]
    tl.store(out_TF, _gated(gate_TF, up_TF).to(hidden_ptr.dtype.element_ty), mask=inside_TF)


def launch(
    x_TD: Tensor, gate_up_GD: Tensor, down_DF: Tensor, addend_TD: Tensor | None, scale: float
) -> Tensor:
    """Run a narrow layer on checked inputs."""
    (num_tokens, width), hidden = x_TD.shape, down_DF.shape[1]
    out_TD = torch.empty_like(x_TD)
    if num_tokens == 0:
        return out_TD
    _swiglu_kernel[(triton.cdiv(num_tokens, NARROW_T),)](
        x_TD,
        gate_up_GD,
        down_DF,
        x_TD if addend_TD is None else addend_TD,
        out_TD,
        num_tokens,
        scale,
        HAS_ADDEND=addend_TD is not None,
        D=width,
        F=hidden,
        BLOCK_T=NARROW_T,
        BLOCK_D=max(MIN_BLOCK, triton.next_power_of_2(width)),
        BLOCK_F=max(MIN_BLOCK, min(NARROW_F, triton.next_power_of_2(hidden))),
        num_warps=4,
        num_stages=2,
    )
    return out_TD


def launch_gate_up(x_TD: Tensor, gate_up_GD: Tensor) -> Tensor:
    """Return the hidden rows of a wide layer, [T, F]."""
    (num_tokens, width), hidden = x_TD.shape, gate_up_GD.shape[0] // 2
    hidden_TF = x_TD.new_empty(num_tokens, hidden)
    if num_tokens == 0:
        return hidden_TF
    num_tiles = triton.cdiv(num_tokens, LARGE.t) * triton.cdiv(hidden, LARGE.f)
    tile = LARGE if num_tiles >= MANY_TILES else SMALL
    tile = FLOAT32 if x_TD.element_size() > 2 else tile
    _gate_up_kernel[(triton.cdiv(hidden, tile.f), triton.cdiv(num_tokens, tile.t))](
        x_TD,
        gate_up_GD,
        hidden_TF,
        num_tokens,
        D=width,
        F=hidden,
        BLOCK_T=tile.t,
        BLOCK_D=tile.d,
        BLOCK_F=tile.f,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return hidden_TF
