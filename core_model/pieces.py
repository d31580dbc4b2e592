"""A sequence that is run in pieces, between two of which anything else may run.

A long one whose task says ``chunk_tokens``: one chunk of one layer of the blocks at a time.
One whose adapter and head are work by themselves, such as a CT window, whose task says
``pieces``: pieces of the adapter, the blocks layer by layer, pieces of the head.

The answer is that of the uncut sequence, up to the order of floating-point sums.

Legend: T tokens, D model.
"""

from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from core_model.chunks import LongSequence
from core_model.model import StepOutput
from core_model.packing import Encoded, RaggedBatch
from core_model.paused import Paused

if TYPE_CHECKING:
    from core_model.model import MoETransformer


class PiecedAdapter(Protocol):
    """An adapter that pauses between two pieces of its work."""

    def in_pieces(self, batch: RaggedBatch) -> Paused[Encoded]:
        """Encode one sequence."""
        ...


class PiecedHead(Protocol):
    """A head that does."""

    def in_pieces(self, tokens_TD: Tensor, encoded: Encoded) -> Paused[tuple[Tensor, Tensor]]:
        """Return output rows and offsets of one sequence."""
        ...


class PiecedSequence:
    """One sequence on its way.

    Args:
        work: ``in_chunks`` or ``in_pieces`` of it.
    """

    def __init__(self, work: Paused[StepOutput]) -> None:
        self._work = work
        self._output: StepOutput | None = None
        self.num_done = 0

    def advance(self) -> None:
        """Run the next piece."""
        self.num_done += 1
        try:
            next(self._work)
        except StopIteration as end:
            self._output = cast("StepOutput", end.value)

    def complete(self) -> StepOutput:
        """Return the output.

        Raises:
            RuntimeError: It is not done: the task states fewer pieces than there are.
        """
        if self._output is None:
            message = f"expected an answer after {self.num_done} pieces, got none"
            raise RuntimeError(message)
        return self._output


def in_chunks(
    model: "MoETransformer", task: str, batch: RaggedBatch, chunk_tokens: int
) -> Paused[StepOutput]:
    """Run a long sequence; adapter and head come with the first and the last chunk."""
    encoded: Encoded = model.adapters[task](batch)
    blocks = yield from _up(LongSequence(model, task, encoded, chunk_tokens))
    output = model.heads[task](blocks.tokens_TD, encoded)
    return StepOutput({task: output}, blocks.experts_LTK, encoded.cu_tokens)


def in_pieces(model: "MoETransformer", task: str, batch: RaggedBatch) -> Paused[StepOutput]:
    """Run a sequence whose adapter and head are work by themselves."""
    adapter = cast("PiecedAdapter", model.adapters[task])
    head = cast("PiecedHead", model.heads[task])
    encoded = yield from adapter.in_pieces(batch)
    yield
    blocks = yield from _up(LongSequence(model, task, encoded, encoded.tokens_TD.shape[0]))
    yield
    output = yield from head.in_pieces(blocks.tokens_TD, encoded)
    return StepOutput({task: output}, blocks.experts_LTK, encoded.cu_tokens)


def _up(sequence: LongSequence) -> Paused[LongSequence]:
    """Take a sequence through the blocks."""
    sequence.advance()
    while not sequence.is_done:
        yield
        sequence.advance()
    return sequence
