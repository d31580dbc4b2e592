"""A sequence whose adapter and head are work by themselves, in pieces: a CT window.

    adapter, some pieces  ->  the shared blocks, one piece  ->  head, some pieces

Between two pieces anything else may run.  The blocks run its tokens in one call with those of
other sequences (``MoETransformer.run_encoded``).  The answer is that of the uncut sequence, up
to the order of floating-point sums.

Legend: T tokens, D model, L layers, K chosen experts.
"""

from collections.abc import Generator
from typing import Protocol, TypeVar, cast

from torch import Tensor

from core_model.packing import Encoded, RaggedBatch

T = TypeVar("T")


class PiecedAdapter(Protocol):
    """An adapter that pauses between two pieces of its work."""

    def in_pieces(self, batch: RaggedBatch) -> Generator[None, None, Encoded]:
        """Encode one sequence."""
        ...


class PiecedHead(Protocol):
    """A head that does."""

    def in_pieces(
        self, tokens_TD: Tensor, encoded: Encoded
    ) -> Generator[None, None, tuple[Tensor, Tensor]]:
        """Return output rows and offsets of one sequence."""
        ...


class PiecedSequence:
    """One sequence on its way.

    Args:
        task: Its task.
        adapter: Of that task.
        head: Likewise.
        batch: The sequence.
    """

    def __init__(
        self, task: str, adapter: PiecedAdapter, head: PiecedHead, batch: RaggedBatch
    ) -> None:
        self.task = task
        self._encoding = adapter.in_pieces(batch)
        self._head = head
        self._answering: Generator[None, None, tuple[Tensor, Tensor]] | None = None
        self.num_done = 0
        self.encoded: Encoded | None = None
        self._experts_LTK: Tensor | None = None
        self._output: tuple[Tensor, Tensor] | None = None

    @property
    def is_before_blocks(self) -> bool:
        """Whether the next piece is that of the blocks, see ``pass_blocks``."""
        return self.encoded is not None and self._answering is None

    def advance(self) -> None:
        """Run the next piece of adapter or head."""
        self.num_done += 1
        if self._answering is None:
            self.encoded = _next(self._encoding)
        else:
            self._output = _next(self._answering)

    def pass_blocks(self, tokens_TD: Tensor, experts_LTK: Tensor) -> None:
        """Take what the blocks made of its tokens."""
        if self.encoded is None:
            message = f"expected a sequence whose adapter is done, {self.num_done} pieces are"
            raise RuntimeError(message)
        self.num_done += 1
        self._experts_LTK = experts_LTK
        self._answering = self._head.in_pieces(tokens_TD, self.encoded)

    def complete(self) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return output rows and offsets, chosen experts [L, T, K], and token offsets.

        Raises:
            RuntimeError: It is not done: the task states fewer pieces than there are.
        """
        if self.encoded is None or self._experts_LTK is None or self._output is None:
            message = f"expected an answer after {self.num_done} pieces, got none"
            raise RuntimeError(message)
        return self._output, self._experts_LTK, self.encoded.cu_tokens


def _next(work: Generator[None, None, T]) -> T | None:
    """Run work up to its next pause; return its result if that was the last piece."""
    try:
        next(work)
    except StopIteration as end:
        return cast("T", end.value)
    return None
