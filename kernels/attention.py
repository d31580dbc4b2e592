"""Attention inside packed sequences, in both directions.

Covered: full, and sliding window with global positions; any mix of lengths.  Not
covered: causal masks, grouped queries, padding.

Legend: T packed positions, H heads, d head width, B sequences, n positions of one
sequence, G sequences of equal length, q queries, k keys.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from kernels.dispatch import (
    FLOATS,
    Impl,
    check,
    compute_dtype,
    environment_impl,
    needs_grad,
    select_impl,
)

SHORT = 3  # positions of a sequence up to which elementwise products win, with gradient and without
BLOCK_QUERIES = 256  # rows of a masked block: one score tile of a window of 1024 stays in cache
BACKENDS = [  # without cuDNN's, which plans anew, for a second, at every length it meets
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
HALF = 2  # bytes of a number, with which tiles train; wider ones would spill
LAUNCH_QUERIES = 8192  # the same on a GPU, where a launch costs more than masked scores


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """Which positions of a sequence see each other.

    Args:
        window: None = all.  Else positions at most ``window // 2`` apart.
        num_global: The first positions of each sequence that see all and are seen by all.
    """

    window: int | None
    num_global: int = 0

    def __post_init__(self) -> None:
        if self.num_global < 0 or (self.window is not None and self.window < 0):
            message = f"expected window and num_global from 0, got {self.window}, {self.num_global}"
            raise ValueError(message)

    def sees_all(self, length: int) -> bool:
        """Tell whether all positions of a sequence this long see each other."""
        return self.window is None or length <= self.window // 2 + 1


FULL = AttentionPattern(window=None)


def varlen_attention(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    cu_seqlens: Tensor,
    pattern: AttentionPattern,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v over the positions that each query may see.

    Args:
        q_THd: Queries, float; the last axis contiguous, the others free.
        k_THd: Keys, shape and dtype of the queries.
        v_THd: Values, shape and dtype of the queries.
        cu_seqlens: Sequence offsets from 0 to T, int32 [B+1]; a sequence may be empty.
        pattern: Visible positions.
        impl: Form to run.

    Returns:
        [T, H, d], dtype of the queries, contiguous.  A NaN stays inside its sequence, save in
        training on a GPU.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Cost:
        FLOPs ``4 H d`` for each visible pair; bytes ``4 T H d`` elements.  A window of 1024 with 64
        global positions, one sequence of 65,536, H16 D128 bfloat16: 0.66 TFLOP, 0.84 ms at 778
        TFLOP/s.  Gradients take 3.5 times that.  Measured on an H200, 2026-11-28, in a CUDA graph:
        that window 1.38 ms (.57 of the roofline; FlashAttention-3 without the global positions
        1.19), full attention over 8,192 positions 1.07 ms (.66; FlashAttention-3 .80, cuDNN .87).

    Source:
        Vaswani et al. 2017, eq. 1; pattern: Beltagy et al. 2020 (arXiv:2004.05150).
    """
    check("q_THd", q_THd, (None, None, None), FLOATS, contiguous=False)
    for name, tensor in (("k_THd", k_THd), ("v_THd", v_THd)):
        check(name, tensor, q_THd.shape, q_THd.dtype, contiguous=False)
    if {q_THd.stride(2), k_THd.stride(2), v_THd.stride(2)} != {1}:
        message = f"expected stride 1 along the head, got q strides {q_THd.stride()}"
        raise ValueError(message)
    check("cu_seqlens", cu_seqlens, (None,), torch.int32)
    form = select_impl(impl, q_THd, k_THd, v_THd)
    if form == "triton":
        from kernels._triton.attention import launch  # noqa: PLC0415 - Triton is optional

        return launch(q_THd, k_THd, v_THd, cu_seqlens, pattern)
    may_launch = impl == "auto" and environment_impl() == "auto"
    if may_launch and q_THd.is_cuda and pattern.window is not None and q_THd.itemsize == HALF:
        from kernels._triton import attention_grad  # noqa: PLC0415 - Triton is optional

        if attention_grad.fits(q_THd, k_THd, v_THd, cu_seqlens):
            return attention_grad.attend(q_THd, k_THd, v_THd, cu_seqlens, pattern)
    run = attention_reference if form == "reference" else _attention_torch
    return run(q_THd, k_THd, v_THd, cu_seqlens, pattern)


def visible(query_Q: Tensor, key_K: Tensor, pattern: AttentionPattern) -> Tensor:
    """Return which keys each query may see, bool [Q, K], from positions in the sequence."""
    query_Q1, key_1K = query_Q.unsqueeze(1), key_K.unsqueeze(0)
    if pattern.window is None:
        return torch.ones_like(query_Q1 == key_1K)
    near_QK = (query_Q1 - key_1K).abs() <= pattern.window // 2
    return near_QK | (query_Q1 < pattern.num_global) | (key_1K < pattern.num_global)


def attention_reference(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, pattern: AttentionPattern
) -> Tensor:
    """The formula, sequence by sequence."""
    wide, pieces = compute_dtype(q_THd.dtype), []
    for length, start in zip(cu_seqlens.diff().tolist(), cu_seqlens.tolist(), strict=False):
        q, k, v = (x[start : start + length].to(wide) for x in (q_THd, k_THd, v_THd))
        position = torch.arange(length, device=q.device)
        scores_HQK = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
        hidden_QK = ~visible(position, position, pattern)
        weights_HQK = scores_HQK.masked_fill(hidden_QK, -torch.inf).softmax(dim=-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights_HQK, v))
    return torch.cat([q_THd.new_empty(0, *q_THd.shape[1:]), *pieces]).to(q_THd.dtype)


def _attention_torch(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, pattern: AttentionPattern
) -> Tensor:
    """Sequences of equal length as one batch: no padding, one product per length.

    Where torch's own flash kernel takes them as they are, which it does in training on a GPU,
    all lengths are one call.
    """
    in_training = needs_grad(q_THd, k_THd, v_THd)
    if q_THd.is_cuda and in_training and pattern.window is None and q_THd.element_size() == 2:
        longest = int(cu_seqlens.diff().max())
        mixed = varlen_attn(q_THd, k_THd, v_THd, cu_seqlens, cu_seqlens, longest, longest)
        return cast("Tensor", mixed)
    groups = _groups(cu_seqlens)
    with sdpa_kernel(BACKENDS):
        if [n * len(starts) for n, starts in groups.items()] == [q_THd.shape[0]]:
            (n,) = groups
            q, k, v = (x.view(-1, n, *x.shape[1:]) for x in (q_THd, k_THd, v_THd))
            return _equal_lengths(q, k, v, pattern).reshape(q_THd.shape).contiguous()
        if q_THd.is_cuda and in_training and q_THd.shape[0] <= LAUNCH_QUERIES:
            return _masked(q_THd, k_THd, v_THd, cu_seqlens, pattern)
        return _by_length(q_THd, k_THd, v_THd, groups, pattern)


def _by_length(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    groups: Mapping[int, Sequence[int]],
    pattern: AttentionPattern,
) -> Tensor:
    """A product for each length; a position alone in its sequence has its value as output."""
    out_THd = v_THd.clone(memory_format=torch.contiguous_format)
    for n, starts in groups.items():
        if n == 1:
            continue
        start_G = torch.tensor(starts, device=q_THd.device)
        rows = (start_G.unsqueeze(1) + torch.arange(n, device=q_THd.device)).flatten()
        q, k, v = (x.index_select(0, rows).unflatten(0, (-1, n)) for x in (q_THd, k_THd, v_THd))
        out_THd.index_copy_(0, rows, _equal_lengths(q, k, v, pattern).flatten(0, 1))
    return out_THd


def _masked(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, pattern: AttentionPattern
) -> Tensor:
    """All sequences in one product, strangers masked: on a GPU a launch costs more than scores."""
    everyone = torch.arange(q_THd.shape[0], dtype=torch.int32, device=q_THd.device)
    sequence_T = torch.searchsorted(cu_seqlens[1:].contiguous(), everyone, right=True)
    position_T = everyone - cu_seqlens[sequence_T]
    mask_TT = sequence_T.unsqueeze(1) == sequence_T.unsqueeze(0)
    mask_TT &= visible(position_T, position_T, pattern)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_THd, v_THd))
    mixed_1HTd = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT)
    return mixed_1HTd[0].transpose(0, 1).contiguous()


def _groups(cu_seqlens: Tensor) -> dict[int, list[int]]:
    """Return the starts of the sequences of each length, empty ones left out."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    offsets = cu_seqlens.tolist()
    for start, end in pairwise(offsets):
        if end > start:
            groups[end - start].append(start)
    return groups


def _equal_lengths(
    q_GnHd: Tensor, k_GnHd: Tensor, v_GnHd: Tensor, pattern: AttentionPattern
) -> Tensor:
    """Return the attention of a batch, [G, n, H, d]."""
    n = q_GnHd.shape[1]
    sees_all = pattern.sees_all(n)
    if sees_all and n <= SHORT:
        return _short(q_GnHd, k_GnHd, v_GnHd)
    q, k, v = (x.transpose(1, 2) for x in (q_GnHd, k_GnHd, v_GnHd))
    if sees_all:
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    num_global = min(pattern.num_global, n)
    rows = LAUNCH_QUERIES if q.is_cuda else BLOCK_QUERIES
    bounds = [*range(num_global, n, rows), n]
    pieces = [functional.scaled_dot_product_attention(q[:, :, :num_global], k, v)]
    for start, end in pairwise(bounds):
        pieces.append(_window_block(q, k, v, range(start, end), pattern))
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _short(q_GnHd: Tensor, k_GnHd: Tensor, v_GnHd: Tensor) -> Tensor:
    """Return full attention by elementwise products, which beat tiny matrix products."""
    products_GqkHd = q_GnHd.unsqueeze(2) * k_GnHd.unsqueeze(1)
    scores_GqkH = products_GqkHd.sum(dim=-1) * q_GnHd.shape[3] ** -0.5
    weights_GqkH = scores_GqkH.softmax(dim=2)
    mixed_GqHd: Tensor = (weights_GqkH.unsqueeze(-1) * v_GnHd.unsqueeze(1)).sum(dim=2)
    return mixed_GqHd


def _window_block(
    q: Tensor, k: Tensor, v: Tensor, block: range, pattern: AttentionPattern
) -> Tensor:
    """Return the attention of a block of queries over their windows and the globals."""
    half, n = (pattern.window or 0) // 2, q.shape[2]
    low = max(pattern.num_global, block.start - half)
    high = min(n, block.stop + half)
    everyone = torch.arange(n, device=q.device)
    key_K = torch.cat([everyone[: pattern.num_global], everyone[low:high]])
    mask_QK = visible(everyone[block.start : block.stop], key_K, pattern)
    return functional.scaled_dot_product_attention(
        q[:, :, block.start : block.stop],
        k.index_select(2, key_K),
        v.index_select(2, key_K),
        attn_mask=mask_QK,
    )
