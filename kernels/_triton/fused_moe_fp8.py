"""Triton form of ``kernels.fused_moe_fp8``: as ``fused_moe``, products of 8-bit floats.

A program multiplies a tile of rows by two blocks of 128 columns, gate and up or two neighbours of
down, so that each block has one scale per 128 inner columns.  The sum over these 128 comes out of
the tensor cores, is scaled and added in float32 (the cores keep some 14 bits while they sum).
Up quantises the hidden rows on its accumulators: a block of columns is a run that shares a scale.

Bytes: E_hit * 3 D F of weights, T D + R F * 2 of 8-bit rows in and out, 2 R D w of outputs
between Down and Combine (w bytes a value), T D w out.  FLOPs: 6 R D F.

Deterministic, and nothing waits for the host.

Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.2 (scales, promotion).

On Hopper tiles of 128 rows have a form of their own, ``fused_moe_fp8_wide``.

Measured on an H200 (2026-11-28), fraction of the roofline, Qwen3-30B-A3B: T = 64, 256: .91, .88;
16384 by the other form (2026-11-29): .671, 845 TFLOPS.

Legend: R routed rows, D model, F expert hidden, N output columns, K inner columns, S runs of 128.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._triton import fused_moe_fp8_wide
from kernels._triton.chain import begin, is_chained
from kernels._triton.combine import launch_combine
from kernels._triton.fused_moe import place
from kernels._triton.numerics import INTERPRET, LARGEST, LEAST, dot
from kernels.fused_moe_fp8 import RUN
from kernels.moe_config import MoELaunch, ProductLaunch
from kernels.routing import Routing

CARRY = tl.constexpr(2.0**20 + 1.0)  # leaves 4 of 24 bits (Dekker 1971)


@triton.jit
def _scaled_product(
    x_RK: tl.tensor,
    w_NK: tl.tensor,
    x_scale_R: tl.tensor,
    w_scale: tl.tensor,
    sums: tl.tensor,
    SWAP: tl.constexpr,
) -> tl.tensor:
    """Add the product over one run of inner columns."""
    if SWAP:
        part = dot(w_NK, x_RK.T, tl.zeros(sums.shape, tl.float32))
        sums += part * (x_scale_R * w_scale)[None, :]
    else:
        part = dot(x_RK, w_NK.T, tl.zeros(sums.shape, tl.float32))
        sums += part * (x_scale_R * w_scale)[:, None]
    return sums


@triton.jit
def _larger(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """Return the larger of both, NaN if one is NaN."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantised(hidden_RN: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return rows as they are cast to 8 bits, and their scales."""
    most_R = tl.reduce(tl.abs(hidden_RN), 1, _larger)
    step_R = tl.where(most_R <= LEAST, 1.0, most_R / LARGEST)  # NaN of NaN
    hidden_RN = hidden_RN * tl.where(most_R <= LEAST, 0.0, 1.0 / step_R)[:, None]
    if INTERPRET:  # its cast to 8 bits loses a carry into the exponent: round before
        wide_RN = hidden_RN * CARRY
        hidden_RN = wide_RN - (wide_RN - hidden_RN)
    return hidden_RN, step_R


@triton.jit
def _multiply_fp8(
    tile: tl.tensor,
    pair: tl.tensor,
    x: tl.tensor,  # a pointer or a descriptor
    x_scale_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    weight: tl.tensor,  # a descriptor
    w_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    GATED: tl.constexpr,
    SWAP: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RUN: tl.constexpr,
) -> None:
    """Write a pair of blocks of columns of the rows of a tile; begin late, if told."""
    num_runs, num_blocks = K // RUN, N // RUN
    expert = tl.load(tile_expert_ptr + tile)
    end = tl.load(ends_ptr + expert)
    first = tl.load(tile_row_ptr + tile)
    begin(CHAINED)
    row_R = first + tl.arange(0, BLOCK_R)
    source_R = tl.minimum(row_R, end - 1)  # rows of others are computed and not stored
    if GATED:
        source_R = tl.load(tokens_ptr + source_R)
        left, right = (2 * expert) * num_blocks + pair, (2 * expert + 1) * num_blocks + pair
    else:
        left = expert * num_blocks + 2 * pair
        right = tl.minimum(left + 1, (expert + 1) * num_blocks - 1)  # of an odd number: twice
    x_scale_R = x_scale_ptr + source_R * num_runs
    left_scale_ptr = w_scale_ptr + left * num_runs
    right_scale_ptr = w_scale_ptr + right * num_runs
    inner_K = tl.arange(0, RUN)
    if SWAP:
        left_sums = tl.zeros((RUN, BLOCK_R), tl.float32)
    else:
        left_sums = tl.zeros((BLOCK_R, RUN), tl.float32)
    right_sums = left_sums
    for run in range(num_runs):
        x_scale = tl.load(x_scale_R + run)
        left_scale = tl.load(left_scale_ptr + run)
        right_scale = tl.load(right_scale_ptr + run)
        if GATED:
            x_RK = tl.load(x + source_R.to(tl.int64)[:, None] * K + (run * RUN + inner_K)[None, :])
        else:
            x_RK = x.load([first, run * RUN])
        w_NK = weight.load([left * RUN, run * RUN])
        left_sums = _scaled_product(x_RK, w_NK, x_scale, left_scale, left_sums, SWAP)
        w_NK = weight.load([right * RUN, run * RUN])
        right_sums = _scaled_product(x_RK, w_NK, x_scale, right_scale, right_sums, SWAP)
    if SWAP:
        left_sums, right_sums = left_sums.T, right_sums.T
    column_N = tl.arange(0, RUN)
    if GATED:
        hidden_RN, step_R = _quantised(left_sums * tl.sigmoid(left_sums) * right_sums)
        _store(out_ptr + pair * RUN, hidden_RN, row_R, column_N, end, N)
        tl.store(out_scale_ptr + row_R * num_blocks + pair, step_R, mask=row_R < end)
    else:
        column = (left - expert * num_blocks) * RUN
        _store(out_ptr + column, left_sums, row_R, column_N, end, N)
        if column + RUN < N:  # not a mask: it would cost .2 ms at 16,384 tokens
            _store(out_ptr + column + RUN, right_sums, row_R, column_N, end, N)


@triton.jit
def _store(
    out_ptr: tl.tensor,
    value_RN: tl.tensor,
    row_R: tl.tensor,
    column_N: tl.tensor,
    end: tl.tensor,
    N: tl.tensor,
) -> None:
    out_RN = out_ptr + row_R.to(tl.int64)[:, None] * N + column_N[None, :]
    tl.store(out_RN, value_RN.to(out_ptr.dtype.element_ty), mask=(row_R < end)[:, None])


@triton.jit(do_not_specialize=["num_tiles"])
def _product_fp8_kernel(
    x: tl.tensor,
    x_scale_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    weight: tl.tensor,
    w_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    num_tiles: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    GATED: tl.constexpr,
    SWAP: tl.constexpr,
    CHAINED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RUN: tl.constexpr,
) -> None:
    begin(CHAINED and GATED)  # others know their tile before they wait
    num_pairs = N // RUN if GATED else tl.cdiv(N, 2 * RUN)
    tile, pair = place(tl.program_id(0), num_tiles, num_pairs, GROUP)
    if tl.load(tile_expert_ptr + tile) >= 0:
        _multiply_fp8(
            *(tile, pair, x, x_scale_ptr, tokens_ptr, weight, w_scale_ptr),
            *(out_ptr, out_scale_ptr, ends_ptr, tile_expert_ptr, tile_row_ptr),
            *(N, K, GATED, SWAP, CHAINED and not GATED, BLOCK_R, RUN),
        )


def _product(
    rows: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    routing: Routing,
    config: ProductLaunch,
    *,
    is_gated: bool,
    chained: bool,
) -> None:
    """Fill the output rows (and their scales, if gated); each pair is values and scales."""
    (x, x_scale), (weight_EGK, weight_scale) = rows, weight
    if fused_moe_fp8_wide.fits(routing):
        group = config.group
        fused_moe_fp8_wide.product(rows, weight, out, routing, group, is_gated=is_gated)
        return
    _, width, inner = weight_EGK.shape
    width = width // 2 if is_gated else width
    weight_rows = TensorDescriptor.from_tensor(weight_EGK.view(-1, inner), [RUN, RUN])
    source = x if is_gated else TensorDescriptor.from_tensor(x, [routing.block_rows, RUN])
    num_tiles = min(routing.tile_expert_M.numel(), routing.tokens_R.numel())
    num_pairs = width // RUN if is_gated else triton.cdiv(width, 2 * RUN)
    _product_fp8_kernel[(num_tiles * num_pairs,)](
        source,
        x_scale,
        routing.tokens_R,
        weight_rows,
        weight_scale,
        *out,
        routing.ends_E,
        routing.tile_expert_M,
        routing.tile_row_M,
        num_tiles,
        width,
        inner,
        GATED=is_gated,
        SWAP=config.swap,
        CHAINED=chained,
        GROUP=config.group,
        BLOCK_R=routing.block_rows,
        RUN=RUN,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=chained,
    )


def launch_up(
    x: tuple[Tensor, Tensor], gate_up: tuple[Tensor, Tensor], routing: Routing, config: MoELaunch
) -> tuple[Tensor, Tensor]:
    """Return the hidden rows in expert order, [R, F], and their scales, [R, S]."""
    hidden, num_rows = gate_up[0].shape[1] // 2, routing.tokens_R.numel()
    out = (
        x[0].new_empty(num_rows, hidden),
        x[1].new_empty(num_rows, hidden // RUN),
    )
    _product(x, gate_up, out, routing, config.up, is_gated=True, chained=is_chained(config))
    return out


def launch_down(
    hidden: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    routing: Routing,
    config: MoELaunch,
    dtype: torch.dtype,
) -> Tensor:
    """Return the outputs of the experts in expert order, [R, D]."""
    shape = (routing.tokens_R.numel(), down[0].shape[1])
    y_RD = torch.empty(shape, dtype=dtype, device=down[0].device)
    out, chained = (y_RD, hidden[1]), is_chained(config)
    _product(hidden, down, out, routing, config.down, is_gated=False, chained=chained)
    return y_RD


def launch(
    x: tuple[Tensor, Tensor],
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    routing: Routing,
    config: MoELaunch,
    dtype: torch.dtype,
) -> Tensor:
    """Run all three on checked inputs."""
    if routing.tokens_R.numel() == 0:
        return torch.empty(x[0].shape, dtype=dtype, device=x[0].device)
    hidden = launch_up(x, gate_up, routing, config)
    y_RD = launch_down(hidden, down, routing, config, dtype)
    return launch_combine(y_RD, routing, config)
