"""Attention over chosen blocks of keys, the choice included, beside dense attention.

Legend: T packed positions, H heads, d head width, N checked rows, K keys, I blocks of queries.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import kernel_attention_peers as peers
from benchmarks.kernel_attention_inputs import AttentionInputs
from benchmarks.kernel_block_sparse_flex import by_flex_blocks
from benchmarks.kernel_op import OURS, Call, Case, Op, Peer, spread_rows
from benchmarks.kernel_roofline import Work
from kernels.attention import FULL
from kernels.block_sparse import SparsePattern, block_sparse_attention, seen_blocks
from kernels.compress import pool_spans

CHECKED_ROWS = 8
CUDNN_DENSE = "SDPA cuDNN dense"


class SparseShape(NamedTuple):
    """Positions of one sequence, heads and what is attended to."""

    name: str
    length: int
    num_heads: int
    width: int
    pattern: SparsePattern


class SparseInputs(NamedTuple):
    """Queries, keys and values of one sequence, and what is attended to."""

    dense: AttentionInputs
    pattern: SparsePattern


SHAPES = tuple(
    SparseShape(f"{pattern.far} H16 D128", length, 16, 128, pattern)
    for pattern in (SparsePattern(), SparsePattern(num_selected=0, far="pooled"))
    for length in (65536, 131072)
)
TINY_SHAPES = (
    SparseShape("dropped H2 D16", 45, 2, 16, SparsePattern(2, 8, 3, "dropped", 16, 8, 2)),
    SparseShape("pooled H2 D16", 45, 2, 16, SparsePattern(0, 8, 3, "pooled", 16, 8, 2)),
)


def _draw(shape: SparseShape, dtype: torch.dtype, generator: torch.Generator) -> SparseInputs:
    size, device = (shape.length, shape.num_heads, shape.width), generator.device
    drawn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    cu_seqlens = torch.tensor([0, shape.length], dtype=torch.int32, device=device)
    qkv = (drawn(*size), drawn(*size), drawn(*size))
    return SparseInputs(AttentionInputs(*qkv, cu_seqlens, (shape.length,), FULL), shape.pattern)


def _cases(device: str) -> Sequence[Case[SparseInputs]]:
    is_cpu = device == "cpu"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    return [
        Case(shape.name, shape.length, "-", dtype, partial(_draw, shape, dtype))
        for shape in (TINY_SHAPES if is_cpu else SHAPES)
    ]


def _work(inputs: SparseInputs) -> Work:
    """Inputs in, outputs out; scores of spans, then two products over what is attended to."""
    pattern, (n, num_heads, width) = inputs.pattern, inputs.dense.q.shape
    near = (pattern.query_block + 2 * (pattern.window // 2)) // pattern.key_block
    blocks = near + pattern.num_global_blocks + pattern.num_selected
    keys = min(n, blocks * pattern.key_block)
    if pattern.far == "pooled":
        keys += n // pattern.pool
    flops = 2 * num_heads * width * n * (n / pattern.pool + 2 * keys)
    num_bytes = 4 * n * num_heads * width * inputs.dense.q.dtype.itemsize
    return Work(num_bytes, flops, inputs.dense.q.dtype)


def _exact(inputs: SparseInputs) -> tuple[Tensor, Tensor]:
    """Rows one by one, by the definition; the choice in float32, as it is defined."""
    q_nHd, k_nHd, v_nHd = inputs.dense[:3]
    pattern, n = inputs.pattern, len(q_nHd)
    row_N = spread_rows(n, CHECKED_ROWS, q_nHd.device)
    position_n = torch.arange(n, device=q_nHd.device)
    values = []
    for row in row_N.tolist():
        first = row // pattern.query_block * pattern.query_block
        q_QHd = q_nHd[first : first + pattern.query_block]
        seen_HJ = seen_blocks(q_QHd, k_nHd, pattern, first=first)[:, 0]
        seen_Hn = seen_HJ[:, position_n // pattern.key_block]
        score_Hn = torch.einsum("hd,khd->hk", q_nHd[row].double(), k_nHd.double())
        score_Hn = (score_Hn * q_nHd.shape[2] ** -0.5).masked_fill(~seen_Hn, -torch.inf)
        key, value = score_Hn, v_nHd.double()
        if pattern.far == "pooled":
            far_HS, pooled_v = _far(inputs, q_nHd[row], seen_HJ)
            key, value = torch.cat([key, far_HS], dim=1), torch.cat([value, pooled_v])
        values.append(torch.einsum("hk,khd->hd", key.softmax(dim=1), value))
    return row_N, torch.stack(values)


def _far(inputs: SparseInputs, q_Hd: Tensor, seen_HJ: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the spans with what their number of positions adds, and their values."""
    pattern, n = inputs.pattern, len(inputs.dense.k)
    num_spans = -(-n // pattern.pool)
    k_SHd, v_SHd = (
        pool_spans(x, inputs.dense.cu_seqlens, pattern.pool, impl="torch")[:num_spans].double()
        for x in (inputs.dense.k, inputs.dense.v)
    )
    first_S = torch.arange(num_spans, device=q_Hd.device) * pattern.pool
    bias_S = (n - first_S).clamp(max=pattern.pool).double().log()
    score_HS = torch.einsum("hd,shd->hs", q_Hd.double(), k_SHd) * q_Hd.shape[1] ** -0.5 + bias_S
    return score_HS.masked_fill(seen_HJ[:, first_S // pattern.key_block], -torch.inf), v_SHd


def _ours(inputs: SparseInputs) -> Call:
    dense = inputs.dense
    qkv = (dense.q, dense.k, dense.v)
    return lambda: block_sparse_attention(*qkv, dense.cu_seqlens, inputs.pattern)


def _dense(inputs: SparseInputs) -> Call:
    return peers.by_cudnn(inputs.dense)


def _flex(inputs: SparseInputs) -> Call:
    return by_flex_blocks(inputs.dense, inputs.pattern)


BLOCK_SPARSE: Op[SparseInputs] = Op(
    "block_sparse",
    _cases,
    [
        Peer(OURS, _ours),
        Peer(CUDNN_DENSE, _dense, does_less="all keys, which costs more"),
        Peer("FlexAttention", _flex, is_compiled=True, does_less="the choice is given"),
    ],
    _work,
    _exact,
)
