"""Attention in packed sequences: full, and a sliding window with global positions.

Rows of "gradients" are forward and backward together.

Legend: T packed positions, H heads, d head width, B sequences, N checked rows, K keys.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import kernel_attention_peers as peers
from benchmarks.kernel_attention_grads import exact_gradients, with_gradients
from benchmarks.kernel_attention_inputs import AttentionInputs
from benchmarks.kernel_op import OURS, Call, Case, Op, Peer, spread_rows
from benchmarks.kernel_roofline import Work, attention_work
from kernels.attention import FULL, AttentionPattern, varlen_attention, visible
from kernels.dispatch import Impl

CHECKED_ROWS = 24
GRAD_FLOPS = 3.5  # times those of the forward: 5 products more for each visible pair, of 2
GRAD_BYTES = 3  # forward, then q, k, v, output and its gradient in, three gradients out
WINDOW = AttentionPattern(window=1024, num_global=64)


class AttentionShape(NamedTuple):
    """Lengths of the sequences, heads, what sees what, and whether gradients are wanted."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    width: int
    pattern: AttentionPattern
    with_gradients: bool = False


SHAPES = (
    AttentionShape("window 1024+64 H16 D128", (65536,), 16, 128, WINDOW),
    AttentionShape("window 1024+64 H16 D128", (8192,), 16, 128, WINDOW),
    AttentionShape("full H16 D128", (8192,), 16, 128, FULL),
    AttentionShape("full H16 D128", (32768,), 16, 128, FULL),
    AttentionShape("full 2048x4 H4 D32", (4,) * 2048, 4, 32, FULL),  # transactions in `base`
    AttentionShape("full ragged H16 D64", (16, 64, 256, 1024, 4096) * 2, 16, 64, FULL),
    AttentionShape("gradients window 1024+64 H16 D128", (65536,), 16, 128, WINDOW, True),
    AttentionShape("gradients window 1024+64 H16 D128", (8192,), 16, 128, WINDOW, True),
    AttentionShape("gradients full H16 D128", (8192,), 16, 128, FULL, True),
)
TINY_SHAPES = (
    AttentionShape("window 8+2 H2 D16", (24,), 2, 16, AttentionPattern(8, 2)),
    AttentionShape("full ragged H2 D16", (3, 5, 1), 2, 16, FULL),
    AttentionShape("gradients window 8+2 H2 D16", (24, 9), 2, 16, AttentionPattern(8, 2), True),
)


def _draw(shape: AttentionShape, dtype: torch.dtype, generator: torch.Generator) -> AttentionInputs:
    size, device = (sum(shape.lengths), shape.num_heads, shape.width), generator.device
    drawn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    offsets = torch.tensor([0, *shape.lengths]).cumsum(0)
    cu_seqlens = offsets.to(device, torch.int32)
    q, k, v = (drawn(*size).requires_grad_(shape.with_gradients) for _ in range(3))
    grad = drawn(*size) if shape.with_gradients else None
    return AttentionInputs(q, k, v, cu_seqlens, shape.lengths, shape.pattern, grad)


def _cases(device: str) -> Sequence[Case[AttentionInputs]]:
    is_cpu = device == "cpu"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    return [
        Case(shape.name, sum(shape.lengths), "-", dtype, partial(_draw, shape, dtype))
        for shape in (TINY_SHAPES if is_cpu else SHAPES)
    ]


def _work(inputs: AttentionInputs) -> Work:
    _, num_heads, width = inputs.q.shape
    work = attention_work(inputs.lengths, inputs.pattern, num_heads, width, inputs.q.dtype)
    if inputs.grad is None:
        return work
    return Work(GRAD_BYTES * work.num_bytes, GRAD_FLOPS * work.flops, work.dtype)


def _exact(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Rows one by one over the keys of their sequence."""
    if inputs.grad is not None:
        return exact_gradients(inputs, inputs.grad)
    row_N = spread_rows(len(inputs.q), CHECKED_ROWS, inputs.q.device)
    sequence_N = torch.searchsorted(inputs.cu_seqlens, row_N, right=True) - 1
    values = []
    for row, sequence in zip(row_N.tolist(), sequence_N.tolist(), strict=True):
        start, end = inputs.cu_seqlens[sequence : sequence + 2].tolist()
        q_Hd = inputs.q[row].double()
        k_KHd, v_KHd = (x[start:end].double() for x in (inputs.k, inputs.v))
        key_K = torch.arange(end - start, device=q_Hd.device)
        seen_K = visible(key_K[row - start : row - start + 1], key_K, inputs.pattern)[0]
        score_HK = torch.einsum("hd,khd->hk", q_Hd, k_KHd) * q_Hd.shape[1] ** -0.5
        weight_HK = score_HK.masked_fill(~seen_K, -torch.inf).softmax(dim=1)
        values.append(torch.einsum("hk,khd->hd", weight_HK, v_KHd))
    return row_N, torch.stack(values)


def _run(impl: Impl, inputs: AttentionInputs) -> Call:
    qkv = (inputs.q, inputs.k, inputs.v)
    return lambda: varlen_attention(*qkv, inputs.cu_seqlens, inputs.pattern, impl=impl)


ATTENTION: Op[AttentionInputs] = Op(
    "attention",
    _cases,
    [
        Peer(OURS, with_gradients(partial(_run, "auto"))),
        Peer("torch eager", with_gradients(partial(_run, "torch"))),
        Peer("SDPA flash", with_gradients(peers.by_flash)),
        Peer("SDPA cuDNN", with_gradients(peers.by_cudnn)),
        Peer("FlashAttention-3", peers.by_fa3),
        Peer(peers.FA3_WINDOW, peers.by_fa3_window, does_less="no global positions"),
        Peer("FlexAttention", with_gradients(peers.by_flex), is_compiled=True),
    ],
    _work,
    _exact,
)
