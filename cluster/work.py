"""What a request is cut into: the pieces that the scheduler spreads over steps.

A piece is a whole sequence; or one chunk of one layer of a long one whose task allows it
(``core_model.chunks``); or a part of what adapter, blocks and head do for one, where its task
says so (``core_model.pieces``).  Pieces of a sequence are consecutive and run in order.

Legend: P pieces, B sequences.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ENTRY_SHARE = 1 / 8  # of a layer: what a chunk costs below the first one, its projections alone


@dataclass(frozen=True, eq=False)
class Work:
    """The pieces of one request.

    Args:
        tokens: Tokens' worth of work of each piece, int64 [P].
        sequence: The sequence of each piece, rising, int64 [P].
    """

    tokens: NDArray[np.int64]
    sequence: NDArray[np.int64]

    @classmethod
    def whole(cls, tokens: NDArray[np.int64]) -> "Work":
        """Every sequence in one piece."""
        return cls(tokens, np.arange(tokens.size))

    @classmethod
    def cut(cls, tokens: NDArray[np.int64], chunk_tokens: int, num_layers: int) -> "Work":
        """Cut sequences above ``chunk_tokens`` (0 = none may be cut) by chunk and layer.

        Args:
            tokens: Tokens of each sequence [B].
            chunk_tokens: Tokens of a chunk.
            num_layers: Layers of the model; a chunk passes below each and above the last.
        """
        if chunk_tokens == 0 or tokens.max(initial=0) <= chunk_tokens:
            return cls.whole(tokens)
        chunks = -(-tokens // chunk_tokens)
        is_cut = tokens > chunk_tokens
        counts = np.where(is_cut, chunks * (num_layers + 1), 1)
        layers = np.where(is_cut, chunks * (num_layers + ENTRY_SHARE), 1.0)  # work, in pieces
        per_piece = np.repeat(tokens / layers, counts)
        place = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        is_entry = np.repeat(is_cut, counts) & (place < np.repeat(chunks, counts))
        pieces = np.where(is_entry, ENTRY_SHARE * per_piece, per_piece)
        return cls(
            np.maximum(pieces.astype(np.int64), 1), np.repeat(np.arange(tokens.size), counts)
        )

    @classmethod
    def even(cls, tokens: NDArray[np.int64], pieces: int) -> "Work":
        """Cut every sequence into so many pieces, whose tokens add up to its own."""
        ends = tokens[:, None] * np.arange(pieces + 1) // pieces
        return cls(np.diff(ends, axis=1).ravel(), np.repeat(np.arange(tokens.size), pieces))

    @property
    def num_pieces(self) -> int:
        """P."""
        return self.tokens.size

    @cached_property
    def is_whole(self) -> NDArray[np.bool_]:
        """Which pieces are whole sequences, [P]."""
        whole: NDArray[np.bool_] = np.bincount(self.sequence)[self.sequence] == 1
        return whole

    @cached_property
    def is_cut(self) -> bool:
        """Whether any sequence has several pieces."""
        return not bool(self.is_whole.all())
