"""Means of spans of positions: what is kept of keys and values that are far away.

A span of 16 positions becomes one row, so far keys and values take a sixteenth of the memory.
``kernels.block_sparse`` scores such rows to choose what to attend to, and attends to them.

Legend: T packed positions, P pooled rows, H heads, d head width, B sequences, n positions of one.
"""

import torch
from torch import Tensor

from kernels.dispatch import FLOATS, Impl, check, compute_dtype, select_impl


def pool_spans(x_THd: Tensor, cu_seqlens: Tensor, span: int, *, impl: Impl = "auto") -> Tensor:
    """Return the mean of each span of each sequence.

    Row ``cu_seqlens[s] // span + s + i`` is the mean over positions ``i * span`` to
    ``min((i + 1) * span, n) - 1`` of sequence s, computed in float32 or wider and rounded once.
    The other rows, at most one a sequence, are zero.

    Args:
        x_THd: Keys or values, float; the last axis contiguous, the others free.
        cu_seqlens: Sequence offsets from 0 to T, int32 [B+1].
        span: Positions of a row.
        impl: Form to run.

    Returns:
        [T // span + B, H, d], dtype of ``x_THd``, contiguous.

    Raises:
        ValueError: A shape, dtype or span disagrees with the above.

    Cost:
        Reads T * H * d elements, writes 1 / span of that; bound by memory.  On one H200, keys of
        65,536 positions, H16 D128 bfloat16: least 66 us at 4.27 TB/s.

    Source:
        Block means as compressed keys: Lu et al. 2025 (MoBA, arXiv:2502.13189), eq. 6.
    """
    check("x_THd", x_THd, (None, None, None), FLOATS, contiguous=False)
    check("cu_seqlens", cu_seqlens, (None,), torch.int32)
    if span < 1:
        message = f"expected span from 1, got {span}"
        raise ValueError(message)
    form = select_impl(impl, x_THd)
    if form == "triton":
        from kernels._triton.compress import launch  # noqa: PLC0415 - Triton is optional

        return launch(x_THd, cu_seqlens, span)
    return (
        _pool_reference(x_THd, cu_seqlens, span)
        if form == "reference"
        else _pool_torch(x_THd, cu_seqlens, span)
    )


def num_pooled(num_rows: int, num_sequences: int, span: int) -> int:
    """Return how many rows hold the spans of any sequences of so many positions together."""
    return num_rows // span + num_sequences


def _pool_reference(x_THd: Tensor, cu_seqlens: Tensor, span: int) -> Tensor:
    """The formula, span by span."""
    offsets = cu_seqlens.tolist()
    rows = num_pooled(len(x_THd), len(offsets) - 1, span)
    out_PHd = x_THd.new_zeros(rows, *x_THd.shape[1:])
    for s in range(len(offsets) - 1):
        for i, first in enumerate(range(offsets[s], offsets[s + 1], span)):
            last = min(first + span, offsets[s + 1])
            mean_Hd = x_THd[first:last].to(compute_dtype(x_THd.dtype)).mean(dim=0)
            out_PHd[offsets[s] // span + s + i] = mean_Hd
    return out_PHd


def _pool_torch(x_THd: Tensor, cu_seqlens: Tensor, span: int) -> Tensor:
    """Sums by index, differentiable."""
    num_sequences = cu_seqlens.numel() - 1
    row_T = torch.arange(len(x_THd), dtype=torch.int32, device=x_THd.device)
    sequence_T = torch.searchsorted(cu_seqlens[1:].contiguous(), row_T, right=True)
    start_T = cu_seqlens[sequence_T]
    slot_T = start_T // span + sequence_T + (row_T - start_T) // span
    wide = x_THd.to(compute_dtype(x_THd.dtype))
    rows = num_pooled(len(x_THd), num_sequences, span)
    sum_PHd = wide.new_zeros(rows, *x_THd.shape[1:]).index_add(0, slot_T, wide)
    count_P = wide.new_zeros(rows).index_add(0, slot_T, wide.new_ones(len(x_THd)))
    return (sum_PHd / count_P.clamp(min=1).view(-1, 1, 1)).to(x_THd.dtype)
