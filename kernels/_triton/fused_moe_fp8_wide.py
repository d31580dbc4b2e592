"""Both products of ``fused_moe_fp8`` for tiles of 128 rows, in Gluon, for sm_90.

A persistent program multiplies 128 rows by two blocks of 128 columns: gate and up, or two
neighbours of down.  Its warps are of three kinds.  A producer fills a ring of stages, one run of
128 inner columns each; two consumers own 64 rows each.  While one of them scales a partial
product and adds it in float32, the tensor cores multiply for the other.

A stage holds rows, both blocks of weights, and their scales.  Weights, and rows of Down, come
through TMA; rows of Up are gathered by ``cp.async``, and so are all scales.  Two barriers a stage:

    full    2 arrivals, the bytes of TMA and what ``cp.async`` brought; the latter is waited for a
            step late, fenced (wgmma reads through the async proxy) and then told
    empty   2 arrivals, one of each consumer, after its last product of the stage

All warps walk the same list of places, in the launch order of ``fused_moe``.

Bytes and FLOPs are those of ``fused_moe_fp8``; so are the values but for the sigmoid, from the
exponential and the reciprocal of the hardware.  Deterministic, and nothing waits for the host.
Triton's interpreter has no Gluon: it tests the form for other tiles, and a GPU this one beside it.

Measured on an H200 (2026-11-29, in a CUDA graph), Qwen3-30B-A3B, 16,384 tokens: Up 745 us, 1,106
TFLOPS, Down 432 us, 955 TFLOPS (1,116 and 614 us in the other form); with the weighted sum
1,464 to 1,524 us, .64 to .67 of the roofline.

Sources: warps that load and warps that multiply, FlashAttention-3 (Shah et al. 2024,
arXiv:2407.08608); one consumer's promotion under the other's product, DeepGEMM (DeepSeek-V3,
arXiv:2412.19437, section 3.5.2).

Legend: R routed rows, D model, F expert hidden, N output columns, K inner columns, S stages.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels._triton import fused_moe
from kernels._triton.numerics import INTERPRET, LARGEST, LEAST
from kernels.fused_moe_fp8 import RUN
from kernels.moe_config import NUM_CORES
from kernels.routing import Routing

BLOCK_R = 128  # rows of a tile
STAGES = 4
CONSUMER_REGISTERS = 232  # of 504 a thread that the three kinds share
PRODUCER_REGISTERS = 40
HOPPER = (9, 0)  # wgmma
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
MINUS_LOG2E = gl.constexpr(-1.4426950408889634)

place = gluon.jit(fused_moe.place.fn)
Pair = tuple[Tensor, Tensor]  # values and scales


def fits(routing: Routing) -> bool:
    """Tell whether the products can run here with these tiles."""
    if INTERPRET.value or routing.block_rows != BLOCK_R:
        return False
    rows = routing.tokens_R
    return not rows.is_cuda or torch.cuda.get_device_capability(rows.device) == HOPPER


@gluon.jit
def _larger(left: gl.tensor, right: gl.tensor) -> gl.tensor:
    """Return the larger of both, NaN if one is NaN."""
    return gl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _pinned(sums: gl.tensor) -> gl.tensor:
    """Return the sums, added before what follows; else they wait and both products need registers."""
    return gl.inline_asm_elementwise("// $0", "=f,0", [sums], gl.float32, False, 1)


@gluon.jit
def _swiglu(gate: gl.tensor, up: gl.tensor) -> gl.tensor:
    """Return gate * sigmoid(gate) * up, from the exponential and the reciprocal of the hardware."""
    power = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [gate * MINUS_LOG2E], gl.float32, True, 1
    )
    sigmoid = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], gl.float32, True, 1
    )
    return gate * sigmoid * up


@gluon.jit
def _blocks(
    expert: gl.tensor, pair: gl.tensor, num_blocks: gl.tensor, GATED: gl.constexpr
) -> tuple[gl.tensor, gl.tensor]:
    """Return which two blocks of 128 rows of the weights a place multiplies by."""
    if GATED:
        left = (2 * expert) * num_blocks + pair
        right = left + num_blocks
    else:
        left = expert * num_blocks + 2 * pair
        right = gl.minimum(left + 1, (expert + 1) * num_blocks - 1)  # of an odd number: twice
    return left, right


@gluon.jit
def _expert_at(
    position: gl.tensor,
    tile_expert_ptr: gl.tensor,
    num_used: gl.tensor,
    num_pairs: gl.tensor,
    GROUP: gl.constexpr,
) -> gl.tensor:
    """Return the expert of a place, of the last one beyond it; with no tile, anything."""
    num_used = gl.maximum(num_used, 1)
    last = gl.minimum(position, num_used * num_pairs - 1)
    tile, _ = place(last, num_used, num_pairs, GROUP)
    return gl.load(tile_expert_ptr + tile)


@gluon.jit
def _produce(
    ring: gl.tuple, source: gl.tuple, tiles: gl.tuple, GATED: gl.constexpr, GROUP: gl.constexpr
) -> None:
    """Fill the stages, place after place."""
    x_S, w_S, x_scale_S, left_scale_S, right_scale_S, full_S, empty_S = ring
    ends_ptr, tile_expert_ptr, tile_row_ptr, num_used, N, K = tiles
    x, x_scale_ptr, tokens_ptr, weight, w_scale_ptr = source
    STAGES: gl.constexpr = x_S.shape[0]
    BLOCK_R: gl.constexpr = x_S.shape[1]
    RUN: gl.constexpr = x_S.shape[2]
    CHUNK: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    BYTES: gl.constexpr = 2 * RUN * RUN if GATED else 2 * RUN * RUN + BLOCK_R * RUN
    num_runs, num_blocks = K // RUN, N // RUN
    num_pairs = num_blocks if GATED else gl.cdiv(num_blocks, 2)
    inner_K = gl.arange(0, RUN, gl.SliceLayout(0, CHUNK))
    one = gl.arange(0, 1, LINE)
    step = 0
    for position in range(gl.program_id(0), num_used * num_pairs, gl.num_programs(0)):
        tile, pair = place(position, num_used, num_pairs, GROUP)
        expert = gl.load(tile_expert_ptr + tile)
        first = gl.load(tile_row_ptr + tile)
        end = gl.load(ends_ptr + expert)
        left, right = _blocks(expert, pair, num_blocks, GATED)
        line_R = gl.minimum(first + gl.arange(0, BLOCK_R, LINE), end - 1)
        x_RK = x
        if GATED:
            line_R = gl.load(tokens_ptr + line_R)
            row_R = first + gl.arange(0, BLOCK_R, gl.SliceLayout(1, CHUNK))
            row_R = gl.load(tokens_ptr + gl.minimum(row_R, end - 1))
            x_RK = x + row_R.to(gl.int64)[:, None] * K + inner_K[None, :]
        x_scale_R = x_scale_ptr + line_R * num_runs
        left_scale = w_scale_ptr + left * num_runs + one
        right_scale = w_scale_ptr + right * num_runs + one
        for run in range(num_runs):
            stage = step % STAGES
            full = full_S.index(stage)
            mbarrier.wait(empty_S.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full, BYTES)
            left_w, right_w = w_S.index(2 * stage), w_S.index(2 * stage + 1)
            tma.async_copy_global_to_shared(weight, [left * RUN, run * RUN], full, left_w)
            tma.async_copy_global_to_shared(weight, [right * RUN, run * RUN], full, right_w)
            if GATED:
                async_copy.async_copy_global_to_shared(x_S.index(stage), x_RK + run * RUN)
            else:
                tma.async_copy_global_to_shared(x, [first, run * RUN], full, x_S.index(stage))
            async_copy.async_copy_global_to_shared(x_scale_S.index(stage), x_scale_R + run)
            async_copy.async_copy_global_to_shared(left_scale_S.index(stage), left_scale + run)
            async_copy.async_copy_global_to_shared(right_scale_S.index(stage), right_scale + run)
            async_copy.commit_group()
            async_copy.wait_group(1)
            fence_async_shared()
            gl.thread_barrier()  # all have copied and fenced
            mbarrier.arrive(full_S.index((step + STAGES - 1) % STAGES), pred=step > 0)
            step += 1
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(full_S.index((step + STAGES - 1) % STAGES), pred=step > 0)


@gluon.jit
def _consume(
    ring: gl.tuple,
    out: gl.tuple,
    tiles: gl.tuple,
    GATED: gl.constexpr,
    GROUP: gl.constexpr,
    HALF: gl.constexpr,
) -> None:
    """Multiply half of the rows of each place."""
    x_S, w_S, x_scale_S, left_scale_S, right_scale_S, full_S, empty_S = ring
    ends_ptr, tile_expert_ptr, tile_row_ptr, num_used, N, K = tiles
    out_ptr, out_scale_ptr = out
    STAGES: gl.constexpr = x_S.shape[0]
    ROWS: gl.constexpr = x_S.shape[1] // 2
    RUN: gl.constexpr = x_S.shape[2]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RUN, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    num_runs, num_blocks = K // RUN, N // RUN
    num_pairs = num_blocks if GATED else gl.cdiv(num_blocks, 2)
    step = 0
    start = gl.program_id(0)
    expert = _expert_at(start, tile_expert_ptr, num_used, num_pairs, GROUP)
    for position in range(start, num_used * num_pairs, gl.num_programs(0)):
        tile, pair = place(position, num_used, num_pairs, GROUP)
        end = gl.load(ends_ptr + expert)
        first = gl.load(tile_row_ptr + tile) + HALF * ROWS
        after = position + gl.num_programs(0)
        expert = _expert_at(after, tile_expert_ptr, num_used, num_pairs, GROUP)
        left_sums = gl.zeros([ROWS, RUN], gl.float32, MMA)
        right_sums = gl.zeros([ROWS, RUN], gl.float32, MMA)
        part = gl.zeros([ROWS, RUN], gl.float32, MMA)
        never = num_used < 0  # not a constant: the partial sums keep their registers
        for _run in range(num_runs):
            stage = step % STAGES
            mbarrier.wait(full_S.index(stage), (step // STAGES) & 1)
            x = x_S.index(stage).slice(HALF * ROWS, ROWS, dim=0)
            left_w = w_S.index(2 * stage).permute((1, 0))
            right_w = w_S.index(2 * stage + 1).permute((1, 0))
            part = warpgroup_mma(x, left_w, part, use_acc=never, is_async=True)
            x_scale = x_scale_S.index(stage).slice(HALF * ROWS, ROWS, dim=0).load(ROW)
            left_scale = x_scale * left_scale_S.index(stage).load(ROW)
            right_scale = x_scale * right_scale_S.index(stage).load(ROW)
            part = warpgroup_mma_wait(0, deps=[part])
            left_sums = _pinned(left_sums + part * left_scale[:, None])
            part = warpgroup_mma(x, right_w, part, use_acc=never, is_async=True)
            part = warpgroup_mma_wait(0, deps=[part])
            gl.thread_barrier()  # all four warps have read
            mbarrier.arrive(empty_S.index(stage))
            right_sums = _pinned(right_sums + part * right_scale[:, None])
            step += 1
        if GATED:
            hidden = _swiglu(left_sums, right_sums)
            most = gl.reduce(gl.abs(hidden), 1, _larger)
            scale = gl.where(most <= LEAST, 1.0, most / LARGEST)  # NaN of NaN
            hidden = hidden * gl.where(most <= LEAST, 0.0, 1.0 / scale)[:, None]
            row_R = first + gl.arange(0, ROWS, ROW)
            gl.store(out_scale_ptr + row_R * num_blocks + pair, scale, mask=row_R < end)
            _store(out_ptr + pair * RUN, hidden, first, end, N)
        else:
            column = 2 * pair * RUN
            _store(out_ptr + column, left_sums, first, end, N)
            if column + RUN < N:
                _store(out_ptr + column + RUN, right_sums, first, end, N)


@gluon.jit
def _store(
    out_ptr: gl.tensor, value: gl.tensor, first: gl.tensor, end: gl.tensor, N: gl.tensor
) -> None:
    """Write rows below the end, 16 bytes a thread; values stay in their warp."""
    ROWS: gl.constexpr = value.shape[0]
    WIDTH: gl.constexpr = value.shape[1]
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    OUT: gl.constexpr = _out_layout(DTYPE.primitive_bitwidth, ROWS, WIDTH)
    value = gl.convert_layout(value.to(DTYPE), OUT)
    row_R = first + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    column_N = gl.arange(0, WIDTH, gl.SliceLayout(0, OUT))
    out = out_ptr + row_R.to(gl.int64)[:, None] * N + column_N[None, :]
    gl.store(out, value, mask=(row_R < end)[:, None])


@gluon.constexpr_function
def _out_layout(bits: int, rows: int, width: int) -> gl.DistributedLinearLayout:
    """Return a layout of 16 bytes a thread, whole lines, 16 rows to each of four warps."""
    columns = [[0, 1 << bit] for bit in range(width.bit_length() - 1)]
    lines = [[1 << bit, 0] for bit in range(4)]
    vector = (128 // bits).bit_length() - 1
    across = len(columns) - vector
    lanes = columns[vector:] + lines[: 5 - across]
    registers = columns[:vector] + lines[5 - across :]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [rows, width])


@gluon.jit
def _wide_fp8_kernel(
    x: gl.tensor,  # a pointer or a descriptor
    x_scale_ptr: gl.tensor,
    tokens_ptr: gl.tensor,
    weight: gl.tensor,  # a descriptor
    w_scale_ptr: gl.tensor,
    out_ptr: gl.tensor,
    out_scale_ptr: gl.tensor,
    load_ptr: gl.tensor,
    ends_ptr: gl.tensor,
    tile_expert_ptr: gl.tensor,
    tile_row_ptr: gl.tensor,
    N: gl.tensor,
    K: gl.tensor,
    E: gl.constexpr,
    GATED: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_R: gl.constexpr,
    RUN: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
) -> None:
    """Start the three kinds of warps."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_S = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_R, RUN], weight.layout)
    w_S = gl.allocate_shared_memory(weight.dtype, [2 * STAGES, RUN, RUN], weight.layout)
    x_scale_S = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_R], FLAT)
    left_scale_S = gl.allocate_shared_memory(gl.float32, [STAGES, 1], FLAT)
    right_scale_S = gl.allocate_shared_memory(gl.float32, [STAGES, 1], FLAT)
    full_S = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_S = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full_S.index(stage), count=2)
        mbarrier.init(empty_S.index(stage), count=2)
    fence_async_shared()
    expert_E = gl.arange(0, triton.next_power_of_2(E), LINE)
    load_E = gl.load(load_ptr + expert_E, mask=expert_E < E, other=0)
    num_used = gl.sum((load_E + (BLOCK_R - 1)) // BLOCK_R)
    ring = (x_S, w_S, x_scale_S, left_scale_S, right_scale_S, full_S, empty_S)
    tiles = (ends_ptr, tile_expert_ptr, tile_row_ptr, num_used, N, K)
    source = (x, x_scale_ptr, tokens_ptr, weight, w_scale_ptr)
    out = (out_ptr, out_scale_ptr)
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (ring, out, tiles, GATED, GROUP, UPPER)),
            (_consume, (ring, out, tiles, GATED, GROUP, LOWER)),
            (_produce, (ring, source, tiles, GATED, GROUP)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def product(
    rows: Pair, weight: Pair, out: Pair, routing: Routing, group: int, *, is_gated: bool
) -> None:
    """Fill the output rows, and their scales if gated.

    Args:
        rows: Tokens if gated, else routed rows.
        weight: Matrix of each expert, [E, N, K]; gate above up.
        out: Rows in expert order.
        routing: Order and tiles.
        group: Tiles that a block of columns is visited by before the next block.
        is_gated: Gather rows by token and apply SwiGLU.
    """
    (x, x_scale), (weight_ENK, weight_scale) = rows, weight
    num_experts, width, inner = weight_ENK.shape
    width = width // 2 if is_gated else width
    weight_rows = TensorDescriptor.from_tensor(weight_ENK.view(-1, inner), [RUN, RUN], SHARED)
    num_tiles = min(routing.tile_expert_M.numel(), routing.tokens_R.numel())
    num_places = num_tiles * (width // RUN if is_gated else triton.cdiv(width, 2 * RUN))
    _wide_fp8_kernel[(min(num_places, NUM_CORES),)](
        x if is_gated else TensorDescriptor.from_tensor(x, [BLOCK_R, RUN], SHARED),
        x_scale,
        routing.tokens_R,
        weight_rows,
        weight_scale,
        *out,
        routing.load_E,
        routing.ends_E,
        routing.tile_expert_M,
        routing.tile_row_M,
        width,
        inner,
        E=num_experts,
        GATED=is_gated,
        GROUP=group,
        BLOCK_R=BLOCK_R,
        RUN=RUN,
        STAGES=STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
    )
