"""Triton forms of ``kernels.swiglu``: a whole narrow layer, or gate and up of a wide one.

Of a shared expert the last product ends with the sum over each token's choices, ``combine``; the
second product of a wide one is a launch of this module too, while a dense layer takes the
library's.  Such a launch multiplies before it waits for the rows.  Measured in
whole steps alone (docs/log.md).

Launch order of the second product: all column blocks of a tile of tokens, then the next tile; the
hidden rows of the tile are read from the L2 cache, and so is the matrix, 1.6 MB of ``large``.

Legend: T tokens of a tile, D model, F hidden columns of a tile, R routed rows, P parts of one,
K chosen.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.chain import begin
from kernels._triton.combine import choices, num_parts, weighted_sum
from kernels._triton.numerics import dot
from kernels.moe_config import NUM_CORES

MIN_BLOCK = 16  # smallest dimension of a matrix product
NARROW_T, NARROW_F = 64, 64  # tokens and hidden columns of a tile: a warp group's product
MANY_TILES = 264  # twice the multiprocessors of an H200


class _Tile(NamedTuple):
    """Tokens, columns of both gate and up, inner columns, warps and stages of a tile."""

    t: int
    n: int
    k: int
    num_warps: int
    num_stages: int


LARGE, SMALL, FLOAT32 = _Tile(128, 128, 64, 8, 4), _Tile(64, 64, 64, 4, 4), _Tile(64, 64, 32, 8, 3)


class Choices(NamedTuple):
    """Rows whose weighted sum is added to what a token is given.

    Args:
        y_RPD: Rows of parts that are summed too, or whole rows, [R, D].
        rows_TK: Row of each choice.
        weights_TK: Weight of each choice.
        scale: Of the sum.
        chained: Launch while the last kernel ends, which writes ``y_RPD`` and nothing else that
            is read here.
    """

    y_RPD: Tensor
    rows_TK: Tensor
    weights_TK: Tensor
    scale: float
    chained: bool


@triton.jit
def _gated(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["num_tokens", "scale"])
def _swiglu_kernel(
    x_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    down_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,  # 0: no choices are added
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
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
    rows, weights = choices(rows_ptr, weights_ptr, token_T, num_tokens, K)
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
    if K > 0:
        begin(CHAINED)
        routed_TD = weighted_sum(y_ptr, rows, weights, column_D, D, K, PARTS, BLOCK_T, BLOCK_D)
        sum_TD += scale * routed_TD
    tl.store(out_ptr + offset_TD, sum_TD.to(out_ptr.dtype.element_ty), mask=inside_TD)


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up_kernel(
    x_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    num_tokens: tl.tensor,
    CHAINED: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    begin(CHAINED)
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


@triton.jit(do_not_specialize=["num_tokens", "scale"])
def _down_kernel(
    hidden_ptr: tl.tensor,
    down_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    token_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_T, inside_D = token_T < num_tokens, column_D < D
    rows, weights = choices(rows_ptr, weights_ptr, token_T, num_tokens, K)
    inner_F = tl.arange(0, BLOCK_F)
    hidden_TF = hidden_ptr + token_T.to(tl.int64)[:, None] * F + inner_F[None, :]
    down_DF = down_ptr + column_D.to(tl.int64)[:, None] * F + inner_F[None, :]
    sum_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, F, BLOCK_F):
        inside_F = start + inner_F < F
        hidden = tl.load(hidden_TF + start, mask=inside_T[:, None] & inside_F[None, :], other=0.0)
        down = tl.load(down_DF + start, mask=inside_D[:, None] & inside_F[None, :], other=0.0)
        sum_TD = dot(hidden, down.T, sum_TD)
    begin(CHAINED)
    routed_TD = weighted_sum(y_ptr, rows, weights, column_D, D, K, PARTS, BLOCK_T, BLOCK_D)
    sum_TD += scale * routed_TD
    out_TD = out_ptr + token_T.to(tl.int64)[:, None] * D + column_D[None, :]
    inside_TD = inside_T[:, None] & inside_D[None, :]
    tl.store(out_TD, sum_TD.to(out_ptr.dtype.element_ty), mask=inside_TD)


def launch(
    x_TD: Tensor, gate_up_GD: Tensor, down_DF: Tensor, routed: Choices | None = None
) -> Tensor:
    """Run a narrow layer on checked inputs, and add what the choices give."""
    (num_tokens, width), hidden = x_TD.shape, down_DF.shape[1]
    out_TD = torch.empty_like(x_TD)
    if num_tokens == 0:
        return out_TD
    routed = routed or Choices(x_TD, x_TD[:, :0], x_TD, scale=1.0, chained=False)
    _swiglu_kernel[(triton.cdiv(num_tokens, NARROW_T),)](
        x_TD,
        gate_up_GD,
        down_DF,
        routed.y_RPD,
        routed.rows_TK,
        routed.weights_TK,
        out_TD,
        num_tokens,
        routed.scale,
        K=routed.rows_TK.shape[1],
        PARTS=num_parts(routed.y_RPD),
        CHAINED=routed.chained,
        D=width,
        F=hidden,
        BLOCK_T=NARROW_T,
        BLOCK_D=max(MIN_BLOCK, triton.next_power_of_2(width)),
        BLOCK_F=max(MIN_BLOCK, min(NARROW_F, triton.next_power_of_2(hidden))),
        num_warps=8 if routed.rows_TK.shape[1] else 4,  # registers of two sums
        num_stages=2,
        launch_pdl=routed.chained,
    )
    return out_TD


def launch_gate_up(x_TD: Tensor, gate_up_GD: Tensor, *, chained: bool = False) -> Tensor:
    """Return the hidden rows of a wide layer, [T, F]; chained: launch while the last one ends."""
    (num_tokens, width), hidden = x_TD.shape, gate_up_GD.shape[0] // 2
    hidden_TF = x_TD.new_empty(num_tokens, hidden)
    if num_tokens == 0:
        return hidden_TF
    tile = _tile(x_TD, 2 * hidden, MANY_TILES)
    _gate_up_kernel[(triton.cdiv(2 * hidden, tile.n), triton.cdiv(num_tokens, tile.t))](
        x_TD,
        gate_up_GD,
        hidden_TF,
        num_tokens,
        CHAINED=chained,
        D=width,
        F=hidden,
        BLOCK_T=tile.t,
        BLOCK_D=tile.k,
        BLOCK_F=tile.n // 2,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=chained,
    )
    return hidden_TF


def launch_down(hidden_TF: Tensor, down_DF: Tensor, routed: Choices) -> Tensor:
    """Return the second product of a wide layer and what the choices give, [T, D]."""
    num_tokens, (width, hidden) = len(hidden_TF), down_DF.shape
    out_TD = hidden_TF.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out_TD
    tile = _tile(hidden_TF, width, NUM_CORES)  # one to a multiprocessor: shared memory
    _down_kernel[(triton.cdiv(width, tile.n), triton.cdiv(num_tokens, tile.t))](
        hidden_TF,
        down_DF,
        routed.y_RPD,
        routed.rows_TK,
        routed.weights_TK,
        out_TD,
        num_tokens,
        routed.scale,
        K=routed.rows_TK.shape[1],
        PARTS=num_parts(routed.y_RPD),
        CHAINED=routed.chained,
        D=width,
        F=hidden,
        BLOCK_T=tile.t,
        BLOCK_D=tile.n,
        BLOCK_F=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=routed.chained,
    )
    return out_TD


def _tile(left_TN: Tensor, num_columns: int, many: int) -> _Tile:
    """Return how the product of this operand is cut; large tiles from so many on."""
    if left_TN.element_size() > 2:
        return FLOAT32
    num_tiles = triton.cdiv(len(left_TN), LARGE.t) * triton.cdiv(num_columns, LARGE.n)
    return LARGE if num_tiles >= many else SMALL
