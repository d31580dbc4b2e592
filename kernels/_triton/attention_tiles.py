"""Triton form of ``kernels.attention`` for long sequences: tiles of one sequence, two launches.

A program owns a tile of rows and one head; ``attention_fold`` walks over their keys.  The few
global rows see all keys, which would make them the tail of the launch: their keys are cut into
chunks, a program each, and a second launch joins the chunks.  Rows of another sequence are never
loaded, so a NaN cannot reach it.

Legend: Q rows of a tile, K keys of a block, G global rows of a tile, C chunks, H heads, d width.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._triton.attention_fold import fold_keys, key_blocks
from kernels._triton.tiles import find_tile, row_offsets, store_rows
from kernels.attention import AttentionPattern
from kernels.attention_config import tiles

CHUNK = 2048  # keys of a program of global rows: as much work as a tile of a window of 1024
BLOCK_G = 64
MIN_WIDTH = 16  # smallest dimension of a matrix product
MAX_ROW_BYTES = 256  # wider rows spill
MIN_MEAN_LENGTH = 128  # shorter sequences share tiles in the packed form
JOINED_ROWS = 8
LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["lse_stride", "num_sequences", "num_halvings", "num_global_slots"])
def _tiles_kernel(
    q_rows: tl.tensor,
    global_rows: tl.tensor,
    k_rows: tl.tensor,
    v_rows: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    part_ptr: tl.tensor,
    part_stats_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    lse_stride: tl.tensor,
    num_sequences: tl.tensor,
    num_halvings: tl.tensor,
    num_global_slots: tl.tensor,
    stride_h: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # half the window, -1 = full
    NUM_GLOBAL: tl.constexpr,
    ALONE: tl.constexpr,
    WITH_LSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    slot = tl.program_id(0)
    if slot < num_global_slots:
        ROW_TILES: tl.constexpr = (NUM_GLOBAL + BLOCK_G - 1) // BLOCK_G
        _, start, end, chunk = find_tile(
            slot // ROW_TILES, cu_ptr, num_sequences, num_halvings, CHUNK
        )
        n = end - start
        first = (slot % ROW_TILES) * BLOCK_G
        num_rows = tl.minimum(NUM_GLOBAL, n) - first
        low = chunk * CHUNK
        if (low < n) & (num_rows > 0):
            high = tl.minimum(low + CHUNK, n)
            q_Gd = global_rows.load([start + first, head * stride_h])
            peak_G, total_G, sum_Gd = fold_keys(
                q_Gd,
                start + first,
                start,
                k_rows,
                v_rows,
                head * stride_h,
                0,
                start + low,
                start + high,
                0,
                (high - low) // BLOCK_K,
                scale,
                -1,
                ALONE,
                BLOCK_K,
            )
            row_G = tl.arange(0, BLOCK_G)
            if n <= CHUNK:
                out_base = out_ptr + ((start + first).to(tl.int64) * H + head) * D
                out_Gd = sum_Gd / total_G[:, None]
                store_rows(out_base, row_offsets(H * D, BLOCK_G, D), out_Gd, num_rows)
                if WITH_LSE:
                    lse_G = peak_G + tl.log2(total_G)
                    lse_base = lse_ptr + head * lse_stride + start + first
                    tl.store(lse_base + row_G, lse_G, mask=row_G < num_rows)
            else:
                part = (slot * H + head).to(tl.int64) * BLOCK_G
                part_offset_Gd = row_offsets(D, BLOCK_G, D)
                tl.store(part_ptr + part * D + part_offset_Gd, sum_Gd)
                tl.store(part_stats_ptr + part * 2 + row_G * 2, peak_G)
                tl.store(part_stats_ptr + part * 2 + row_G * 2 + 1, total_G)
    else:
        _, start, end, tile = find_tile(
            slot - num_global_slots, cu_ptr, num_sequences, num_halvings, BLOCK_Q
        )
        n = end - start
        num_global = tl.minimum(NUM_GLOBAL, n)
        first = num_global + tile * BLOCK_Q
        if first < n:
            num_rows = n - first
            last = tl.minimum(first + BLOCK_Q, n) - 1
            q_Qd = q_rows.load([start + first, head * stride_h])
            low, high, _, full_begin, full_end = key_blocks(
                first, last, n, num_global, HALF, BLOCK_K
            )
            peak_Q, total_Q, sum_Qd = fold_keys(
                q_Qd,
                start + first,
                start,
                k_rows,
                v_rows,
                head * stride_h,
                num_global,
                start + low,
                start + high,
                full_begin,
                full_end,
                scale,
                HALF,
                ALONE,
                BLOCK_K,
            )
            out_base = out_ptr + ((start + first).to(tl.int64) * H + head) * D
            out_Qd = sum_Qd / total_Q[:, None]
            store_rows(out_base, row_offsets(H * D, BLOCK_Q, D), out_Qd, num_rows)
            if WITH_LSE:
                row_Q = tl.arange(0, BLOCK_Q)
                lse_Q = peak_Q + tl.log2(total_Q)
                lse_base = lse_ptr + head * lse_stride + start + first
                tl.store(lse_base + row_Q, lse_Q, mask=row_Q < num_rows)


@triton.jit(do_not_specialize=["lse_stride"])
def _join_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    part_ptr: tl.tensor,
    part_stats_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    lse_stride: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    NUM_GLOBAL: tl.constexpr,
    WITH_LSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """Join the chunks of some global rows of a sequence that has several."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.program_id(2) * BLOCK_R
    start = tl.load(cu_ptr + sequence)
    n = tl.load(cu_ptr + sequence + 1) - start
    num_rows = tl.minimum(NUM_GLOBAL, n) - first
    if (n > CHUNK) & (num_rows > 0):
        ROW_TILES: tl.constexpr = (NUM_GLOBAL + BLOCK_G - 1) // BLOCK_G
        slot = (start // CHUNK + sequence) * ROW_TILES + first // BLOCK_G
        row_R = first % BLOCK_G + tl.arange(0, BLOCK_R)
        offset_Rd = row_R[:, None] * D + tl.arange(0, D)[None, :]
        peak_R = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        total_R = tl.zeros((BLOCK_R,), tl.float32)
        sum_Rd = tl.zeros((BLOCK_R, D), tl.float32)
        for chunk in range(tl.cdiv(n, CHUNK)):
            part = ((slot + chunk * ROW_TILES) * H + head).to(tl.int64) * BLOCK_G
            own_Rd = tl.load(part_ptr + part * D + offset_Rd)
            own_peak_R = tl.load(part_stats_ptr + part * 2 + row_R * 2)
            own_total_R = tl.load(part_stats_ptr + part * 2 + row_R * 2 + 1)
            new_peak_R = tl.maximum(peak_R, own_peak_R)
            decay_R, own_decay_R = tl.exp2(peak_R - new_peak_R), tl.exp2(own_peak_R - new_peak_R)
            total_R = total_R * decay_R + own_total_R * own_decay_R
            sum_Rd = sum_Rd * decay_R[:, None] + own_Rd * own_decay_R[:, None]
            peak_R = new_peak_R
        out_base = out_ptr + ((start + first).to(tl.int64) * H + head) * D
        out_Rd = sum_Rd / total_R[:, None]
        store_rows(out_base, row_offsets(H * D, BLOCK_R, D), out_Rd, num_rows)
        if WITH_LSE:
            each_R = tl.arange(0, BLOCK_R)
            lse_R = peak_R + tl.log2(total_R)
            lse_base = lse_ptr + head * lse_stride + start + first
            tl.store(lse_base + each_R, lse_R, mask=each_R < num_rows)


def fits(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor) -> bool:
    """Tell whether tiles of one sequence pay, and the bulk copies can fetch the rows."""
    width, itemsize = q_THd.shape[2], q_THd.element_size()
    is_power = width >= MIN_WIDTH and width & (width - 1) == 0
    is_long = q_THd.shape[0] >= MIN_MEAN_LENGTH * (cu_seqlens.numel() - 1)
    strides = {x.stride(1) for x in (q_THd, k_THd, v_THd)}
    return (
        is_power
        and is_long
        and width * itemsize <= MAX_ROW_BYTES
        and len(strides) == 1
        and all(is_aligned(x) for x in (q_THd, k_THd, v_THd))
    )


def is_aligned(x_THd: Tensor) -> bool:
    """Tell whether each row can be fetched by the bulk copy engine."""
    parts = (x_THd.stride(0), x_THd.stride(1), x_THd.storage_offset())
    rows_follow = x_THd.stride(0) >= (x_THd.shape[1] - 1) * x_THd.stride(1) + x_THd.shape[2]
    return rows_follow and all(part * x_THd.element_size() % 16 == 0 for part in parts)


def describe(x_THd: Tensor, block: int) -> TensorDescriptor:
    """Return what fetches a block of rows of one head."""
    num_rows, num_heads, width = x_THd.shape
    columns = (num_heads - 1) * x_THd.stride(1) + width
    return TensorDescriptor(x_THd, [num_rows, columns], [x_THd.stride(0), 1], [block, width])


def launch_tiles(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    cu_seqlens: Tensor,
    pattern: AttentionPattern,
    *,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the kernels on checked inputs that fit.

    Returns:
        Output [T, H, d]; base 2 logarithm of each softmax's total, float32 [H, T], if asked for.
    """
    num_rows, num_heads, width = q_THd.shape
    half = -1 if pattern.window is None else pattern.window // 2
    config = tiles()["full" if half < 0 else "window"]
    num_global = 0 if half < 0 else pattern.num_global
    num_sequences = cu_seqlens.numel() - 1
    block_g = min(BLOCK_G, config.block_q)
    num_chunks = num_rows // CHUNK + num_sequences
    num_global_slots = num_chunks * triton.cdiv(num_global, block_g)
    num_parts = num_global_slots * num_heads * block_g
    out_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
    new = partial(torch.empty, dtype=torch.float32, device=q_THd.device)
    lse_HT = new((num_heads, num_rows) if with_lse else (0,))
    parts = (new(num_parts * width), new(num_parts * 2))
    joined = (out_THd, lse_HT, *parts, cu_seqlens, num_rows)
    shape = {
        "H": num_heads,
        "D": width,
        "NUM_GLOBAL": num_global,
        "WITH_LSE": with_lse,
        "CHUNK": CHUNK,
        "BLOCK_G": block_g,
    }
    num_slots = num_global_slots + num_rows // config.block_q + num_sequences
    _tiles_kernel[(num_slots, num_heads)](
        describe(q_THd, config.block_q),
        describe(q_THd, block_g),
        describe(k_THd, config.block_k),
        describe(v_THd, config.block_k),
        *joined,
        num_sequences,
        num_sequences.bit_length(),
        num_global_slots,
        q_THd.stride(1),
        LOG2_E * width**-0.5,
        HALF=half,
        ALONE=num_sequences == 1,
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        **config.options(),
        **shape,
    )
    if num_global and num_rows > CHUNK:
        block_r = min(JOINED_ROWS, block_g)
        grid = (num_sequences, num_heads, triton.cdiv(num_global, block_r))
        _join_kernel[grid](*joined, BLOCK_R=block_r, num_warps=4, **shape)
    return out_THd, lse_HT
