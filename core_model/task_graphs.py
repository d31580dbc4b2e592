"""An adapter and a head as captured CUDA graphs, one pair per bucket of sequences.

A small adapter is a hundred launches, which take the host longer than the blocks take the GPU.
An adapter takes part by naming ``fixed_tokens``, the tokens of each of its sequences.  It
promises that no sequence touches another, that it makes its tensors where it computes, and
that every tensor of ``Encoded.side`` has one line per sequence.

A padded batch is an ordinary batch: behind the real sequences come idle ones, which share the
idle rows evenly (one that held them all would be a queue of atomic additions).

Legend: B sequences, R rows, W sequences of a bucket.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from core_model.packing import Encoded, RaggedBatch
from core_model.tasks import TaskSpec

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

BUCKETS = (8, 16, 32, 64, 128, 256, 512)  # sequences, one of them idle
WARM_UPS = 2  # kernels are compiled and memory is taken before the capture

Result = TypeVar("Result")


class Captured(NamedTuple, Generic[Result]):
    """A graph and where its results are."""

    graph: torch.cuda.CUDAGraph
    result: Result


def capture(run: Callable[[], Result], pool: "_POOL_HANDLE") -> Captured[Result]:
    """Capture what a function does on the current device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return Captured(graph, result)


@dataclass(frozen=True, slots=True)
class BatchSlots:
    """Fixed places for a batch of fewer than W sequences.

    Args:
        batch: W sequences, as many rows as they may have.
        count_W: 0 .. W, int32 [W + 1].
    """

    batch: RaggedBatch
    count_W: Tensor

    @classmethod
    def of(cls, spec: TaskSpec, width: int, device: torch.device) -> "BatchSlots":
        """Make places for batches of a task."""
        num_rows = width * spec.max_rows
        count_W = torch.arange(width + 1, dtype=torch.int32, device=device)
        extras = {
            name: torch.zeros(
                num_rows if extra.per == "row" else width,
                extra.width,
                dtype=getattr(torch, extra.dtype),
                device=device,
            )
            for name, extra in spec.extras.items()
        }
        rows_RD = torch.zeros(num_rows, spec.d_task, device=device)
        return cls(RaggedBatch(rows_RD, count_W * spec.max_rows, extras), count_W)

    @property
    def width(self) -> int:
        """W."""
        return self.batch.num_sequences

    def fill(self, batch: RaggedBatch) -> None:
        """Put a batch in its place; what follows it is left from others, and idle."""
        num_rows, num = batch.features.shape[0], batch.num_sequences
        slots = self.batch
        slots.features[:num_rows] = batch.features
        for name, values in batch.extras.items():
            slots.extras[name][: values.shape[0]] = values
        idle_rows, num_idle = slots.features.shape[0] - num_rows, self.width - num
        slots.cu_seqlens[:num] = batch.cu_seqlens[:-1]
        torch.add(
            self.count_W[: num_idle + 1] * idle_rows // num_idle,
            num_rows,
            out=slots.cu_seqlens[num:],
        )


@dataclass(frozen=True, slots=True)
class _Bucket:
    """The graphs of one width."""

    slots: BatchSlots
    encode: Captured[Encoded]
    tokens_TD: Tensor
    decode: Captured[tuple[Tensor, Tensor]]


class TaskGraphs:
    """Adapter and head of one task.

    Args:
        adapter: With ``fixed_tokens``; in evaluation mode.
        head: In evaluation mode.
        spec: Of the task.
        device: Where they are.
    """

    def __init__(
        self, adapter: nn.Module, head: nn.Module, spec: TaskSpec, device: torch.device
    ) -> None:
        self._adapter, self._head = adapter, head
        self._spec, self._device = spec, device
        self._buckets: list[_Bucket] = []

    @torch.inference_mode()
    def capture(self, pool: "_POOL_HANDLE") -> None:
        """Capture every bucket."""
        for width in BUCKETS:
            slots = BatchSlots.of(self._spec, width, self._device)
            encode = capture(lambda slots=slots: self._adapter(slots.batch), pool)  # type: ignore[misc]
            tokens_TD = torch.zeros_like(encode.result.tokens_TD)
            decode = capture(
                lambda tokens=tokens_TD, encoded=encode.result: self._head(tokens, encoded),  # type: ignore[misc]
                pool,
            )
            self._buckets.append(_Bucket(slots, encode, tokens_TD, decode))

    def encode(self, batch: RaggedBatch) -> Encoded:
        """Return what the adapter returns; valid until the next step."""
        bucket = self._bucket(batch.num_sequences)
        if bucket is None:
            encoded: Encoded = self._adapter(batch)
            return encoded
        bucket.slots.fill(batch)
        bucket.encode.graph.replay()
        return first_sequences(bucket.encode.result, batch.num_sequences)

    def decode(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return what the head returns for the batch that was encoded last."""
        num = encoded.cu_tokens.numel() - 1
        bucket = self._bucket(num)
        if bucket is None:
            outputs: tuple[Tensor, Tensor] = self._head(tokens_TD, encoded)
            return outputs
        bucket.tokens_TD[: tokens_TD.shape[0]] = tokens_TD
        bucket.decode.graph.replay()
        rows_WD, cu_rows_W = bucket.decode.result
        per_sequence = rows_WD.shape[0] // bucket.slots.width
        return rows_WD[: num * per_sequence], cu_rows_W[: num + 1]

    def _bucket(self, num_sequences: int) -> _Bucket | None:
        return next((each for each in self._buckets if each.slots.width > num_sequences), None)


def first_sequences(encoded: Encoded, num: int) -> Encoded:
    """Return the first sequences of a batch whose sequences all have equally many tokens."""
    width = encoded.cu_tokens.numel() - 1
    tokens, spans = encoded.tokens_TD.shape[0] // width, (encoded.cu_spans.numel() - 1) // width
    return Encoded(
        encoded.tokens_TD[: num * tokens],
        encoded.cu_tokens[: num + 1],
        encoded.cu_spans[: num * spans + 1],
        {name: values[:num] for name, values in encoded.side.items()},
        encoded.pattern,
        encoded.longest_span,
    )
