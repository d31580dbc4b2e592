"""Gradients of windowed attention: Triton, tiles of one sequence, five launches.

What sees what is symmetric, so the tile of a query's keys is the tile of a key's queries, and
both kernels walk as the forward does: rows whose tile they own, partners without masks, then the
edges of the window and the global ones.  Global rows meet all others in chunks; parts are added
by a last launch, in order, so gradients have the same bits each time.

    P = 2^(s - lse)   dV = P^T dO   dP = dO V^T   dS = P (dP - rowsum(O dO))
    dQ = dS K / sqrt(d)   dK = dS^T Q / sqrt(d)

FLOPs: 7 products for each visible pair where the forward has 2.

Legend: R rows that a program owns, C their partners of a step, d head width, H heads.

Source:
    Dao 2023 (FlashAttention-2, arXiv:2307.08691), section 3.1.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.attention_fold import key_blocks
from kernels._triton.attention_tiles import (
    BLOCK_G,
    CHUNK,
    JOINED_ROWS,
    LOG2_E,
    describe,
    fits,
    launch_tiles,
)
from kernels._triton.numerics import dot
from kernels._triton.tiles import find_tile, row_offsets, store_rows
from kernels.attention import AttentionPattern
from kernels.attention_config import tiles

__all__ = ["attend", "fits"]

DELTA_ROWS = 64


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(
    out_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    num_rows: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum over the head of output times its gradient, [H, T]."""
    head = tl.program_id(1)
    row_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_R = row_R < num_rows
    offset_Rd = (row_R.to(tl.int64)[:, None] * H + head) * D + tl.arange(0, D)[None, :]
    out_Rd = tl.load(out_ptr + offset_Rd, mask=inside_R[:, None], other=0.0).to(tl.float32)
    grad_Rd = tl.load(grad_ptr + offset_Rd, mask=inside_R[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + head * num_rows + row_R, tl.sum(out_Rd * grad_Rd, axis=1), mask=inside_R)


@triton.jit
def _grads_of_block(
    one_Rd: tl.tensor,
    two_Rd: tl.tensor,
    lse_R: tl.tensor,
    delta_R: tl.tensor,
    one_rows: tl.tensor,
    two_rows: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    partner: tl.tensor,
    end: tl.tensor,
    column: tl.tensor,
    seen_RC: tl.tensor,
    sum_Rd: tl.tensor,
    value_Rd: tl.tensor,
    scale: tl.tensor,
    OF_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Add what a block of partners gives: to dQ, or to dK and dV."""
    one_Cd = one_rows.load([partner, column])
    two_Cd = two_rows.load([partner, column])
    zero_RC = tl.zeros((one_Rd.shape[0], BLOCK_C), tl.float32)
    score_RC = dot(one_Rd, one_Cd.T, zero_RC)
    grad_RC = dot(two_Rd, two_Cd.T, zero_RC)
    if OF_KEYS:
        row_C = partner + tl.arange(0, BLOCK_C)
        lse_C = tl.load(lse_ptr + row_C, mask=row_C < end, other=0.0)
        delta_C = tl.load(delta_ptr + row_C, mask=row_C < end, other=0.0)
        weight_RC = tl.exp2(score_RC * scale - lse_C[None, :])
        grad_RC = grad_RC - delta_C[None, :]
    else:
        weight_RC = tl.exp2(score_RC * scale - lse_R[:, None])
        grad_RC = grad_RC - delta_R[:, None]
    if MASKED:
        weight_RC = tl.where(seen_RC, weight_RC, 0.0)
    if OF_KEYS:
        value_Rd = dot(weight_RC.to(two_Cd.dtype), two_Cd, value_Rd)
    sum_Rd = dot((weight_RC * grad_RC).to(one_Cd.dtype), one_Cd, sum_Rd)
    return sum_Rd, value_Rd


@triton.jit
def _grads_of_rows(
    one_Rd: tl.tensor,
    two_Rd: tl.tensor,
    lse_R: tl.tensor,
    delta_R: tl.tensor,
    one_rows: tl.tensor,
    two_rows: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    column: tl.tensor,
    num_global: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    full_begin: tl.tensor,
    full_end: tl.tensor,
    scale: tl.tensor,
    HALF: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Gradients of a tile from the first ``num_global`` partners and those from low to high."""
    BLOCK_R: tl.constexpr = one_Rd.shape[0]
    sum_Rd = tl.zeros((BLOCK_R, one_Rd.shape[1]), tl.float32)
    value_Rd = sum_Rd
    for block in tl.range(full_begin, full_end):
        partner = low + block * BLOCK_C
        sum_Rd, value_Rd = _grads_of_block(
            one_Rd,
            two_Rd,
            lse_R,
            delta_R,
            one_rows,
            two_rows,
            lse_ptr,
            delta_ptr,
            partner,
            high,
            column,
            True,
            sum_Rd,
            value_Rd,
            scale,
            OF_KEYS,
            False,
            BLOCK_C,
        )
    num_global_blocks = tl.cdiv(num_global, BLOCK_C)
    num_others = tl.cdiv(high - low, BLOCK_C) - full_end + full_begin
    for turn in tl.range(num_global_blocks + num_others, disable_licm=True):
        block = turn - num_global_blocks
        block = tl.where(block < full_begin, block, block - full_begin + full_end)
        is_global = turn < num_global_blocks
        partner = tl.where(is_global, start + turn * BLOCK_C, low + block * BLOCK_C)
        end = tl.where(is_global, start + num_global, high)
        each_1C = tl.arange(0, BLOCK_C)[None, :]
        seen_RC = each_1C < end - partner
        if HALF >= 0:
            reach = tl.where(is_global, 1 << 30, HALF)
            near_R = first - partner + tl.arange(0, BLOCK_R)
            seen_RC = (tl.abs(near_R[:, None] - each_1C) <= reach) & seen_RC
        sum_Rd, value_Rd = _grads_of_block(
            one_Rd,
            two_Rd,
            lse_R,
            delta_R,
            one_rows,
            two_rows,
            lse_ptr,
            delta_ptr,
            partner,
            end,
            column,
            seen_RC,
            sum_Rd,
            value_Rd,
            scale,
            OF_KEYS,
            True,
            BLOCK_C,
        )
    return sum_Rd, value_Rd


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "num_halvings", "num_global_slots"])
def _grad_kernel(
    one_tile: tl.tensor,
    two_tile: tl.tensor,
    one_global: tl.tensor,
    two_global: tl.tensor,
    one_rows: tl.tensor,
    two_rows: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    value_ptr: tl.tensor,
    part_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_sequences: tl.tensor,
    num_halvings: tl.tensor,
    num_global_slots: tl.tensor,
    stride_h: tl.tensor,
    scale: tl.tensor,
    grad_scale: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    NUM_GLOBAL: tl.constexpr,
    OF_KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """DQ from (Q, dO) and (K, V); OF_KEYS: dK, dV from (K, V) and (Q, dO)."""
    head = tl.program_id(1)
    slot = tl.program_id(0)
    column = head * stride_h
    lse_ptr += head * num_rows
    delta_ptr += head * num_rows
    if slot < num_global_slots:
        ROW_TILES: tl.constexpr = (NUM_GLOBAL + BLOCK_G - 1) // BLOCK_G
        _, start, end, chunk = find_tile(
            slot // ROW_TILES, cu_ptr, num_sequences, num_halvings, CHUNK
        )
        n = end - start
        first = (slot % ROW_TILES) * BLOCK_G
        num_inside = tl.minimum(NUM_GLOBAL, n) - first
        low = chunk * CHUNK
        if (low < n) & (num_inside > 0):
            high = tl.minimum(low + CHUNK, n)
            row_G = start + first + tl.arange(0, BLOCK_G)
            lse_G = tl.load(lse_ptr + row_G, mask=row_G < end, other=0.0)
            delta_G = tl.load(delta_ptr + row_G, mask=row_G < end, other=0.0)
            sum_Gd, value_Gd = _grads_of_rows(
                one_global.load([start + first, column]),
                two_global.load([start + first, column]),
                lse_G,
                delta_G,
                one_rows,
                two_rows,
                lse_ptr,
                delta_ptr,
                start + first,
                start,
                column,
                0,
                start + low,
                start + high,
                0,
                (high - low) // BLOCK_C,
                scale,
                -1,
                OF_KEYS,
                BLOCK_C,
            )
            part = part_ptr + (slot * H + head).to(tl.int64) * (2 * BLOCK_G * D)
            part_offset_Gd = row_offsets(D, BLOCK_G, D)
            tl.store(part + part_offset_Gd, sum_Gd * grad_scale)
            if OF_KEYS:
                tl.store(part + BLOCK_G * D + part_offset_Gd, value_Gd)
    else:
        _, start, end, tile = find_tile(
            slot - num_global_slots, cu_ptr, num_sequences, num_halvings, BLOCK_R
        )
        n = end - start
        num_global = tl.minimum(NUM_GLOBAL, n)
        first = num_global + tile * BLOCK_R
        if first < n:
            last = tl.minimum(first + BLOCK_R, n) - 1
            low, high, _, full_begin, full_end = key_blocks(
                first, last, n, num_global, HALF, BLOCK_C
            )
            row_R = start + first + tl.arange(0, BLOCK_R)
            lse_R = tl.load(lse_ptr + row_R, mask=row_R < end, other=0.0)
            delta_R = tl.load(delta_ptr + row_R, mask=row_R < end, other=0.0)
            sum_Rd, value_Rd = _grads_of_rows(
                one_tile.load([start + first, column]),
                two_tile.load([start + first, column]),
                lse_R,
                delta_R,
                one_rows,
                two_rows,
                lse_ptr,
                delta_ptr,
                start + first,
                start,
                column,
                num_global,
                start + low,
                start + high,
                full_begin,
                full_end,
                scale,
                HALF,
                OF_KEYS,
                BLOCK_C,
            )
            out = ((start + first).to(tl.int64) * H + head) * D
            out_offset_Rd = row_offsets(H * D, BLOCK_R, D)
            store_rows(sum_ptr + out, out_offset_Rd, sum_Rd * grad_scale, n - first)
            if OF_KEYS:
                store_rows(value_ptr + out, out_offset_Rd, value_Rd, n - first)


@triton.jit
def _add_parts_kernel(
    sum_ptr: tl.tensor,
    value_ptr: tl.tensor,
    part_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    NUM_GLOBAL: tl.constexpr,
    OF_KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """Add the chunks of some global rows."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.program_id(2) * BLOCK_R
    start = tl.load(cu_ptr + sequence)
    n = tl.load(cu_ptr + sequence + 1) - start
    num_inside = tl.minimum(NUM_GLOBAL, n) - first
    if num_inside > 0:
        ROW_TILES: tl.constexpr = (NUM_GLOBAL + BLOCK_G - 1) // BLOCK_G
        slot = (start // CHUNK + sequence) * ROW_TILES + first // BLOCK_G
        offset_Rd = (first % BLOCK_G) * D + row_offsets(D, BLOCK_R, D)
        sum_Rd = tl.zeros((BLOCK_R, D), tl.float32)
        value_Rd = tl.zeros((BLOCK_R, D), tl.float32)
        for chunk in range(tl.cdiv(n, CHUNK)):
            part = ((slot + chunk * ROW_TILES) * H + head).to(tl.int64) * (2 * BLOCK_G * D)
            sum_Rd += tl.load(part_ptr + part + offset_Rd)
            if OF_KEYS:
                value_Rd += tl.load(part_ptr + part + BLOCK_G * D + offset_Rd)
        out = ((start + first).to(tl.int64) * H + head) * D
        out_offset_Rd = row_offsets(H * D, BLOCK_R, D)
        store_rows(sum_ptr + out, out_offset_Rd, sum_Rd, num_inside)
        if OF_KEYS:
            store_rows(value_ptr + out, out_offset_Rd, value_Rd, num_inside)


def launch_grads(
    qkv: tuple[Tensor, Tensor, Tensor],
    out_THd: Tensor,
    lse_HT: Tensor,
    grad_THd: Tensor,
    cu_seqlens: Tensor,
    pattern: AttentionPattern,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, [T, H, d] each."""
    q, k, v = qkv
    num_rows, num_heads, width = q.shape
    grad = grad_THd.contiguous()
    if q.stride(1) != grad.stride(1):  # one head stride serves all
        q, k, v = (x.contiguous() for x in qkv)
    delta_HT = torch.empty_like(lse_HT)
    grid = (triton.cdiv(num_rows, DELTA_ROWS), num_heads)
    sizes = {"H": num_heads, "D": width}
    _delta_kernel[grid](out_THd, grad, delta_HT, num_rows, BLOCK=DELTA_ROWS, **sizes)
    run = partial(_launch_one, lse_HT, delta_HT, cu_seqlens, pattern)
    dq, _ = run((q, grad), (k, v), of_keys=False)
    dk, dv = run((k, v), (q, grad), of_keys=True)
    return dq, dk, dv


def _launch_one(
    lse_HT: Tensor,
    delta_HT: Tensor,
    cu_seqlens: Tensor,
    pattern: AttentionPattern,
    own: tuple[Tensor, Tensor],
    partners: tuple[Tensor, Tensor],
    *,
    of_keys: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a pair of tensors, the second one only of keys and values."""
    num_rows, num_heads, width = own[0].shape
    config = tiles()["grad_keys" if of_keys else "grad_queries"]
    num_sequences = cu_seqlens.numel() - 1
    half = -1 if pattern.window is None else pattern.window // 2
    num_global = 0 if half < 0 else pattern.num_global
    block_g = min(BLOCK_G, config.block_q)
    num_global_slots = (num_rows // CHUNK + num_sequences) * triton.cdiv(num_global, block_g)
    new = partial(torch.empty, device=lse_HT.device)
    sum_THd = new(own[0].shape, dtype=own[0].dtype)
    value_THd = new(own[0].shape if of_keys else (0,), dtype=own[0].dtype)
    parts = new(num_global_slots * num_heads * 2 * block_g * width, dtype=torch.float32)
    shape: dict[str, Any] = {
        "H": num_heads,
        "D": width,
        "NUM_GLOBAL": num_global,
        "OF_KEYS": of_keys,
        "CHUNK": CHUNK,
        "BLOCK_G": block_g,
    }
    num_slots = num_global_slots + num_rows // config.block_q + num_sequences
    _grad_kernel[(num_slots, num_heads)](
        *(describe(x, config.block_q) for x in own),
        *(describe(x, block_g) for x in own),
        *(describe(x, config.block_k) for x in partners),
        lse_HT,
        delta_HT,
        sum_THd,
        value_THd,
        parts,
        cu_seqlens,
        num_rows,
        num_sequences,
        num_sequences.bit_length(),
        num_global_slots,
        own[0].stride(1),
        LOG2_E * width**-0.5,
        width**-0.5,
        HALF=half,
        BLOCK_R=config.block_q,
        BLOCK_C=config.block_k,
        **config.options(),
        **shape,
    )
    if num_global:
        block_r = min(JOINED_ROWS, block_g)
        grid = (num_sequences, num_heads, triton.cdiv(num_global, block_r))
        _add_parts_kernel[grid](
            sum_THd, value_THd, parts, cu_seqlens, BLOCK_R=block_r, num_warps=4, **shape
        )
    return sum_THd, value_THd


class TiledAttention(torch.autograd.Function):
    """Attention of long sequences, with gradients."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - what autograd keeps
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        cu_seqlens: Tensor,
        pattern: AttentionPattern,
    ) -> Tensor:
        out_THd, lse_HT = launch_tiles(q_THd, k_THd, v_THd, cu_seqlens, pattern, with_lse=True)
        ctx.save_for_backward(q_THd, k_THd, v_THd, cu_seqlens, out_THd, lse_HT)
        ctx.pattern = pattern
        return out_THd

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - as above
        grad_THd: Tensor,
    ) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, out_THd, lse_HT = ctx.saved_tensors
        grads = launch_grads((q, k, v), out_THd, lse_HT, grad_THd, cu_seqlens, ctx.pattern)
        return (*grads, None, None)


def attend(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, pattern: AttentionPattern
) -> Tensor:
    """Return the attention of checked inputs that fit, differentiable."""
    inputs = (q_THd, k_THd, v_THd, cu_seqlens, pattern)
    out_THd: Tensor = TiledAttention.apply(*inputs)  # type: ignore[no-untyped-call]
    return out_THd
