"""Ragged batches: rows of many sequences end to end, with offsets; nothing is padded.

Legend: R rows, B sequences, D columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import FULL, AttentionPattern


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Sequences of one task, packed.

    Args:
        features: float32 [R, D].
        cu_seqlens: int32 [B+1], row offsets, from 0 to R.
        extras: Named tensors, each [B, ...] or [R, ...] as the task declares.
    """

    features: Tensor
    cu_seqlens: Tensor
    extras: Mapping[str, Tensor]

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_seqlens.numel() - 1


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an adapter hands to the blocks and, past them, to its head.

    Args:
        tokens_TD: Tokens of all sequences end to end [T, D].
        cu_tokens: Token offsets of the sequences, int32 [B+1].
        cu_spans: Token offsets of the attention spans, int32; a span lies inside one
            sequence, and tokens see their own span only.
        side: Whatever the head needs beside the tokens.
        pattern: Which tokens of a span see each other.
        longest_span: Tokens of a span at most; None if that is not known ahead.
    """

    tokens_TD: Tensor
    cu_tokens: Tensor
    cu_spans: Tensor
    side: Mapping[str, Tensor]
    pattern: AttentionPattern = FULL
    longest_span: int | None = None

    @property
    def spans(self) -> "SpanGroup":
        """What the blocks need to know of these tokens."""
        return SpanGroup(self.tokens_TD.shape[0], self.cu_spans, self.pattern, self.longest_span)


class SpanGroup(NamedTuple):
    """Consecutive tokens of a step whose spans share an attention pattern.

    Args:
        num_tokens: How many.
        cu_spans: Their span offsets, int32, from 0 to ``num_tokens``.
        pattern: Which tokens of a span see each other.
        longest_span: Tokens of a span at most; None if that is not known.
    """

    num_tokens: int
    cu_spans: Tensor
    pattern: AttentionPattern
    longest_span: int | None = None

    def fits(self, pattern: AttentionPattern) -> bool:
        """Tell whether another pattern would give the same: spans shorter than its reach do."""
        if self.pattern == pattern:
            return True
        longest = self.longest_span
        return longest is not None and self.pattern.sees_all(longest) and pattern.sees_all(longest)


def merge_groups(groups: Sequence[SpanGroup]) -> list[SpanGroup]:
    """Join neighbours that one pattern fits, so that they are one attention call."""
    merged: list[SpanGroup] = []
    for group in groups:
        joined = _join(merged[-1], group) if merged else None
        merged[-1:] = [*merged[-1:], group] if joined is None else [joined]
    return merged


def _join(one: SpanGroup, other: SpanGroup) -> SpanGroup | None:
    if other.fits(one.pattern):
        pattern = one.pattern
    elif one.fits(other.pattern):
        pattern = other.pattern
    else:
        return None
    known = None not in (one.longest_span, other.longest_span)
    return SpanGroup(
        one.num_tokens + other.num_tokens,
        concat_cu_seqlens([one.cu_spans, other.cu_spans]),
        pattern,
        max(one.longest_span or 0, other.longest_span or 0) if known else None,
    )


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Return offsets 0, l0, l0 + l1, ... of integer lengths [B], int32 [B+1]."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
    return offsets


def segment_ids(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Return the sequence of each row, int64 [R]."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    ids = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return torch.repeat_interleave(ids, lengths, output_size=num_rows)


def concat_cu_seqlens(parts: Sequence[Tensor]) -> Tensor:
    """Join offsets of consecutive packs into the offsets of their concatenation, int32."""
    joined = [parts[0][:1]]
    base = torch.zeros((), dtype=torch.int32, device=parts[0].device)
    for part in parts:
        joined.append(part[1:] + base)
        base = base + part[-1]
    return torch.cat(joined).to(torch.int32)


def take_sequences(batch: RaggedBatch, sequence_idx: Tensor) -> RaggedBatch:
    """Return the named sequences as a batch of their own, in that order.

    Every extra must count by sequence.
    """
    starts = batch.cu_seqlens[:-1].long()[sequence_idx]
    lengths = batch.cu_seqlens[1:].long()[sequence_idx] - starts
    cu_seqlens = offsets_from_lengths(lengths)
    shift = starts - cu_seqlens[:-1].long()
    rows = torch.repeat_interleave(shift, lengths)
    rows = rows + torch.arange(rows.numel(), device=rows.device)
    extras = {name: value[sequence_idx] for name, value in batch.extras.items()}
    return RaggedBatch(batch.features[rows], cu_seqlens, extras)
