"""Triton form of ``kernels.fused_moe``: three launches, tokens to tokens.

Up      h[r] = silu(gate[e] x[t]) * (up[e] x[t])     row r of token t; rows are gathered on the way
Down    y[r] = down[e] h[r]
Combine out[t] = sum_k w[t, k] y[rows[t, k]]

Narrow layers have a form of their own, ``fused_moe_narrow``.  Beside a shared expert Combine is
the end of that one's last product, ``swiglu``, and no launch.

A program owns one tile of the routing's map and a block of output columns.  The rows of gate and
up that belong together are one tile of weights and one product, so SwiGLU takes place between
registers of a thread.  Weights come through TMA, tokens through ``cp.async``, since TMA cannot
gather on sm_90.  A tile of few rows is multiplied from the other side (``swap``): the weights are
the operand of 64 rows that wgmma demands, and no product is spent on rows that are not there.

Launch order: ``group`` tiles, all column blocks of them, then the next tiles; tiles that read
the same weights, and column blocks that read the same rows, meet in the L2 cache.

Bytes: E_hit * 3 D F of weights, 2 T D of tokens, 2 R F of hidden rows (the roofline), and
2 R D of rows between Down and Combine.  FLOPs: 6 R D F.

Deterministic: every sum has one order, and no atomic is used.  Nothing waits for the host.

Sources: Gale et al. 2022 (arXiv:2211.15841) for tiles of ragged experts; Tan et al. 2024
(arXiv:2403.08245) for the gather inside the product; the launch order is that of Triton's
matrix multiplication tutorial.

Measured on an H200 before the slot of the shared expert (2026-11-28, bfloat16, in a CUDA graph),
fraction of the roofline:

    Qwen3-30B-A3B   T = 64, 256, 1024: 1.00, .966, .848     16384: .755, 587 TFLOPS
    Mixtral-8x7B    T = 64, 256: 1.01, .930                 16384: .800
    large           T = 16, 64, 256, 1024: .863, .899, .868, .740

At T = 16384 of Qwen3 Combine took 131 of 2107 us, as its bytes do.  A permuted copy of the tokens for TMA would cost as much again, by its bytes, and only
pay if Up then ran at 95 % of the peak.  One row in 17 of the tiles is nobody's (64 of an expert's
last tile, on average); ``halves`` multiplies half of these.

Legend: R routed rows, D model, F expert hidden, N output columns, K inner columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._triton.chain import begin, is_chained
from kernels._triton.combine import launch_combine
from kernels._triton.numerics import dot
from kernels.moe_config import NUM_CORES, MoELaunch, ProductLaunch
from kernels.routing import Routing

TMA_BYTES = 16  # alignment of the rows of a descriptor


@triton.jit
def place(
    index: tl.tensor, num_tiles: tl.tensor, num_columns: tl.tensor, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the tile and the block of columns that come at this place in the launch order."""
    first = index // (GROUP * num_columns) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = index - first * num_columns
    return first + within % size, within // size


@triton.jit
def _weight_tile(
    weight: tl.tensor,  # a pointer or a descriptor
    expert: tl.tensor,
    column: tl.tensor,
    start: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Return columns of the expert's matrices, gate above up if there are two: [PARTS * N, K]."""
    if TMA:
        w_NK = weight.load([PARTS * expert, column, start]).reshape(PARTS * BLOCK_N, BLOCK_K)
    else:
        part_N = PARTS * expert + tl.arange(0, PARTS * BLOCK_N) // BLOCK_N
        column_N = column + tl.arange(0, PARTS * BLOCK_N) % BLOCK_N
        inner_K = start + tl.arange(0, BLOCK_K)
        offset_NK = (part_N.to(tl.int64) * N + column_N)[:, None] * K + inner_K[None, :]
        inside_NK = (column_N < N)[:, None] & (inner_K < K)[None, :]
        w_NK = tl.load(weight + offset_NK, mask=inside_NK, other=0.0)
    return w_NK


@triton.jit
def _multiply(
    tile: tl.tensor,
    block: tl.tensor,
    x: tl.tensor,  # a pointer or a descriptor
    tokens_ptr: tl.tensor,
    weight: tl.tensor,  # a pointer or a descriptor
    out_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    GATED: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Write a block of columns of the rows of a tile; begin a chained launch late, if told."""
    PARTS: tl.constexpr = 2 if GATED else 1
    expert = tl.load(tile_expert_ptr + tile)
    end = tl.load(ends_ptr + expert)
    first = tl.load(tile_row_ptr + tile)
    begin(CHAINED)
    row_R = first + tl.arange(0, BLOCK_R)
    inner_K = tl.arange(0, BLOCK_K)
    column = block * BLOCK_N
    source_R = tl.minimum(row_R, end - 1)  # rows of others are computed and not stored
    if GATED:
        source_R = tl.load(tokens_ptr + source_R)
    if SWAP:
        sums = tl.zeros((PARTS * BLOCK_N, BLOCK_R), tl.float32)
    else:
        sums = tl.zeros((BLOCK_R, PARTS * BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if TMA and not GATED:
            x_RK = x.load([first, start])
        else:
            x_ptr_RK = x + source_R.to(tl.int64)[:, None] * K + (start + inner_K)[None, :]
            if EVEN_K:
                x_RK = tl.load(x_ptr_RK)
            else:
                x_RK = tl.load(x_ptr_RK, mask=(start + inner_K < K)[None, :], other=0.0)
        w = _weight_tile(weight, expert, column, start, N, K, PARTS, TMA, BLOCK_N, BLOCK_K)
        sums = dot(w, x_RK.T, sums) if SWAP else dot(x_RK, w.T, sums)
    if SWAP:
        sums = sums.T
    if GATED:
        gate_RN, up_RN = sums.reshape(BLOCK_R, 2, BLOCK_N).permute(0, 2, 1).split()
        sums = gate_RN * tl.sigmoid(gate_RN) * up_RN
    column_N = column + tl.arange(0, BLOCK_N)
    inside_RN = (row_R < end)[:, None] & (column_N < N)[None, :]
    out_RN = out_ptr + row_R.to(tl.int64)[:, None] * N + column_N[None, :]
    tl.store(out_RN, sums.to(out_ptr.dtype.element_ty), mask=inside_RN)


@triton.jit(do_not_specialize=["num_tiles"])
def _product_kernel(
    x: tl.tensor,  # a pointer or a descriptor
    tokens_ptr: tl.tensor,
    weight: tl.tensor,  # a pointer or a descriptor
    out_ptr: tl.tensor,
    load_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    num_tiles: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    E: tl.constexpr,  # known where it is needed: other layers run the same code
    GATED: tl.constexpr,  # rows are gathered by token, weights are gate and up
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    HALVES: tl.constexpr,  # a tile that is at most half full is multiplied as half a tile
    PERSISTENT: tl.constexpr,  # a program takes one place after the other
    CHAINED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    EARLY: tl.constexpr = GATED or PERSISTENT  # others know their tile before they wait
    begin(CHAINED and EARLY)
    num_columns = tl.cdiv(N, BLOCK_N)
    position = tl.program_id(0)
    if PERSISTENT:  # the last stores of a place run under the first loads of the next
        expert_E = tl.arange(0, triton.next_power_of_2(E))
        load_E = tl.load(load_ptr + expert_E, mask=expert_E < E, other=0)
        num_used = tl.sum((load_E + (BLOCK_R - 1)) // BLOCK_R)
        for index in tl.range(position, num_used * num_columns, tl.num_programs(0), flatten=True):
            tile, block = place(index, num_used, num_columns, GROUP)
            _multiply(
                *(tile, block, x, tokens_ptr, weight, out_ptr),
                *(ends_ptr, tile_expert_ptr, tile_row_ptr, N, K),
                *(GATED, TMA, EVEN_K, SWAP, False, BLOCK_R, BLOCK_N, BLOCK_K),
            )
    else:
        tile, block = place(position, num_tiles, num_columns, GROUP)
        expert = tl.load(tile_expert_ptr + tile)
        if expert >= 0:
            given = (tile, block, x, tokens_ptr, weight, out_ptr)
            order = (ends_ptr, tile_expert_ptr, tile_row_ptr, N, K)
            LATE: tl.constexpr = CHAINED and not EARLY
            if not HALVES:  # noqa: SIM114 - then the rest is not compiled
                _multiply(
                    *given,
                    *order,
                    *(GATED, TMA, EVEN_K, SWAP, LATE, BLOCK_R, BLOCK_N, BLOCK_K),
                )
            elif tl.load(ends_ptr + expert) - tl.load(tile_row_ptr + tile) > BLOCK_R // 2:
                _multiply(
                    *given,
                    *order,
                    *(GATED, TMA, EVEN_K, SWAP, LATE, BLOCK_R, BLOCK_N, BLOCK_K),
                )
            else:
                _multiply(
                    *given,
                    *order,
                    *(GATED, TMA, EVEN_K, SWAP, LATE, BLOCK_R // 2, BLOCK_N, BLOCK_K),
                )


def _is_aligned(*tensors: Tensor) -> bool:
    """Tell whether TMA can read the rows of these tensors."""
    return all(
        tensor.shape[-1] * tensor.element_size() % TMA_BYTES == 0
        and tensor.data_ptr() % TMA_BYTES == 0
        for tensor in tensors
    )


def _product(
    x: Tensor,
    weight_PNK: Tensor,
    routing: Routing,
    config: ProductLaunch,
    *,
    is_gated: bool,
    chained: bool,
) -> Tensor:
    """Return each row times its expert's matrix, transposed, [R, N].

    Args:
        x: Tokens if gated, else rows.
        weight_PNK: Matrix of each expert, or its gate and its up.
        routing: Order and tiles.
        config: How the product is cut.
        is_gated: Gather rows by token and apply SwiGLU.
        chained: Launch while the last kernel ends.
    """
    _, width, inner = weight_PNK.shape
    config = config.fitted(width, inner)
    num_rows = routing.tokens_R.numel()
    out_RN = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    sources: tuple[Tensor | TensorDescriptor, ...] = (x, weight_PNK)
    tma = _is_aligned(x, weight_PNK)
    if tma:
        block = [2 if is_gated else 1, config.block_n, config.block_k]
        weight = TensorDescriptor.from_tensor(weight_PNK, block)
        rows = TensorDescriptor.from_tensor(x, [routing.block_rows, config.block_k])
        sources = (x if is_gated else rows, weight)
    num_tiles = min(routing.tile_expert_M.numel(), num_rows)  # a used tile has a row
    num_places = num_tiles * triton.cdiv(width, config.block_n)
    _product_kernel[(min(num_places, NUM_CORES) if config.persistent else num_places,)](
        sources[0],
        routing.tokens_R,
        sources[1],
        out_RN,
        routing.load_E,
        routing.ends_E,
        routing.tile_expert_M,
        routing.tile_row_M,
        num_tiles,
        width,
        inner,
        E=routing.load_E.numel() if config.persistent else 0,
        GATED=is_gated,
        TMA=tma,
        EVEN_K=inner % config.block_k == 0,
        SWAP=config.swap,
        HALVES=config.halves and is_gated,
        PERSISTENT=config.persistent,
        CHAINED=chained,
        GROUP=config.group,
        BLOCK_R=routing.block_rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=chained,
    )
    return out_RN


def launch_up(x_TD: Tensor, gate_up_EGD: Tensor, routing: Routing, config: MoELaunch) -> Tensor:
    """Return the hidden rows in expert order, [R, F]."""
    gate_up_PFD = gate_up_EGD.view(-1, gate_up_EGD.shape[1] // 2, x_TD.shape[1])
    return _product(
        x_TD, gate_up_PFD, routing, config.up, is_gated=True, chained=is_chained(config)
    )


def launch_down(h_RF: Tensor, down_EDF: Tensor, routing: Routing, config: MoELaunch) -> Tensor:
    """Return the outputs of the experts in expert order, [R, D]."""
    return _product(
        h_RF, down_EDF, routing, config.down, is_gated=False, chained=is_chained(config)
    )


def launch_rows(
    x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, routing: Routing, config: MoELaunch
) -> Tensor:
    """Return the outputs of the experts in expert order, [R, D], from one token on."""
    h_RF = launch_up(x_TD, gate_up_EGD, routing, config)
    return launch_down(h_RF, down_EDF, routing, config)


def launch(
    x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, routing: Routing, config: MoELaunch
) -> Tensor:
    """Run all three on checked inputs."""
    if x_TD.numel() == 0:
        return torch.empty_like(x_TD)
    y_RD = launch_rows(x_TD, gate_up_EGD, down_EDF, routing, config)
    return launch_combine(y_RD, routing, config)
