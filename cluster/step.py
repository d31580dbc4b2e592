"""One step on the device: pack pieces of many requests, run the model, split the answers.

Whole sequences are packed task by task, end to end; nothing is padded.  Sequences that are cut
run beside them, some pieces a step (``core_model.pieces``).  The split is exact: outputs and
routed experts go to the request whose sequence made them.

``launch`` only starts the work of a GPU; ``collect`` waits for it, so the next step can be
packed meanwhile.

Legend: R rows, B sequences, T tokens, L layers, K chosen experts, E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.scheduler import Job, Slice, Step
from cluster.schemas import SequenceStatus
from core_model.packing import RaggedBatch
from core_model.pieces import PiecedSequence, in_chunks, in_pieces
from core_model.tasks import TaskSpec

if TYPE_CHECKING:
    from core_model.model import MoETransformer, StepOutput

Model = Callable[[Mapping[str, RaggedBatch]], "StepOutput"]


class Span(NamedTuple):
    """Sequences ``first`` to ``last`` (exclusive) of a job that a slice runs whole."""

    part: Slice
    first: int
    last: int

    @property
    def task(self) -> str:
        """Its task."""
        return self.part.job.request.task

    @property
    def rows(self) -> slice:
        """Its rows in the request."""
        cu_seqlens = self.part.job.request.cu_seqlens
        return slice(int(cu_seqlens[self.first]), int(cu_seqlens[self.last]))


class Chunks(NamedTuple):
    """Some pieces of one sequence that a slice runs: up to the piece ``until``, exclusive."""

    part: Slice
    sequence: int
    until: int
    is_last: bool

    @property
    def task(self) -> str:
        """Its task."""
        return self.part.job.request.task

    @property
    def span(self) -> Span:
        """The sequence, whole."""
        return Span(self.part, self.sequence, self.sequence + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """Output rows of consecutive sequences of a job.

    Args:
        outputs: Output rows [R_out, D_out].
        lengths: Output rows of each sequence, int32 [B].
        tokens_per_expert: Their routed (token, choice) pairs, int64 [L, E].
    """

    outputs: NDArray[Any]
    lengths: NDArray[np.int32]
    tokens_per_expert: NDArray[np.int64]

    @property
    def status(self) -> NDArray[np.uint8]:
        """``SequenceStatus`` of each sequence, uint8 [B]."""
        broken_rows = np.flatnonzero(~np.isfinite(self.outputs).all(axis=1))
        sequence_of_row = np.repeat(np.arange(self.lengths.size), self.lengths)
        status = np.full(self.lengths.size, SequenceStatus.OK, dtype=np.uint8)
        status[sequence_of_row[broken_rows]] = SequenceStatus.NON_FINITE
        return status


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """Outputs of some sequences on their way to the host.

    Args:
        units: The spans, or the completed long sequence, that they belong to, in order.
        outputs: Per task: output rows and offsets.
        experts_LTK: Chosen experts.
        cu_tokens: Token offsets of all sequences.
    """

    units: Mapping[str, Sequence[Span | Chunks]]
    outputs: Mapping[str, tuple[Tensor, Tensor]]
    experts_LTK: Tensor
    cu_tokens: Tensor


class Pending(NamedTuple):
    """A launched step."""

    runner: "StepRunner"
    step: Step
    raws: Sequence[Raw]
    done: "torch.cuda.Event | None"


@dataclass(frozen=True, slots=True, eq=False)
class StepRunner:
    """Runs steps of one loaded model.

    Args:
        model: The model in eval mode, on ``device``.
        tasks: What the model serves.
        num_experts: Routed experts per layer, E.
        num_layers: L.
        device: Where the model lives.
    """

    model: Model
    tasks: Mapping[str, TaskSpec]
    num_experts: int
    num_layers: int
    device: str = "cpu"
    _under_way: "WeakKeyDictionary[Job, dict[int, PiecedSequence]]" = field(
        default_factory=WeakKeyDictionary, init=False
    )

    def run(self, step: Step) -> Mapping[Slice, Sequence[Answer]]:
        """Run one step and wait for its answers, in the order of each slice's sequences."""
        return self.collect(self.launch(step))

    @torch.inference_mode()
    def launch(self, step: Step) -> Pending:
        """Pack a step and start it; called on the executor thread only."""
        units = [unit for part in step for unit in _units(part)]
        spans = sorted((u for u in units if isinstance(u, Span)), key=lambda span: span.task)
        cut = [unit for unit in units if isinstance(unit, Chunks)]
        by_task = {task: list(run) for task, run in groupby(spans, lambda span: span.task)}
        batches = {task: self._pack(task, run) for task, run in by_task.items()}
        raws = [self._start_copy(by_task, self.model(batches))] if batches else []
        raws += [
            self._start_copy({unit.task: [unit]}, complete)
            for unit in cut
            if (complete := self._advance(unit)) is not None
        ]
        done = None
        if self.device != "cpu":
            done = torch.cuda.Event()
            done.record()
        return Pending(self, step, raws, done)

    def collect(self, pending: Pending) -> Mapping[Slice, Sequence[Answer]]:
        """Wait for a launched step and split its answers."""
        if pending.done is not None:
            pending.done.synchronize()
        found: dict[Slice, dict[int, Answer]] = {part: {} for part in pending.step}
        for raw in pending.raws:
            for unit, answer in self._split(raw):
                first = unit.first if isinstance(unit, Span) else unit.sequence
                found[unit.part][first] = answer
        return {part: [by[first] for first in sorted(by)] for part, by in found.items()}

    def _advance(self, unit: Chunks) -> "StepOutput | None":
        """Run the pieces of a unit; return the output of its sequence once that is complete."""
        under_way = self._under_way.setdefault(unit.part.job, {})
        if unit.sequence not in under_way:
            under_way[unit.sequence] = self._begin(unit)
        sequence = under_way[unit.sequence]
        while sequence.num_done < unit.until:
            try:
                sequence.advance()
            except BaseException:
                del under_way[unit.sequence]  # it begins anew when it is tried again
                raise
        return under_way.pop(unit.sequence).complete() if unit.is_last else None

    def _begin(self, unit: Chunks) -> PiecedSequence:
        """Return the sequence of a unit, no piece of which has run."""
        task, model = unit.task, cast("MoETransformer", self.model)
        spec, batch = self.tasks[task], self._pack(task, [unit.span])
        if spec.pieces > 1:
            return PiecedSequence(in_pieces(model, task, batch))
        return PiecedSequence(in_chunks(model, task, batch, spec.chunk_tokens))

    def _pack(self, task: str, spans: Sequence[Span]) -> RaggedBatch:
        requests = [span.part.job.request for span in spans]
        lengths = [
            np.diff(request.cu_seqlens)[span.first : span.last]
            for request, span in zip(requests, spans, strict=True)
        ]
        extras = {
            name: [
                request.extras[name][
                    span.rows if extra.per == "row" else slice(span.first, span.last)
                ]
                for request, span in zip(requests, spans, strict=True)
            ]
            for name, extra in self.tasks[task].extras.items()
        }
        features = [r.features[span.rows] for r, span in zip(requests, spans, strict=True)]
        return RaggedBatch(
            features=self._to_device(features),
            cu_seqlens=self._to_device([offsets(np.concatenate(lengths))]),
            extras={name: self._to_device(arrays) for name, arrays in extras.items()},
        )

    def _to_device(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        """Join arrays where the device reads them: through pinned memory on a GPU."""
        if self.device == "cpu":
            return torch.from_numpy(np.concatenate(arrays))
        rows, rest = sum(len(array) for array in arrays), arrays[0].shape[1:]
        dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
        staged = torch.empty((rows, *rest), dtype=dtype, pin_memory=True)
        np.concatenate(arrays, out=staged.numpy())
        return staged.to(self.device, non_blocking=True)

    def _start_copy(
        self, units: Mapping[str, Sequence[Span | Chunks]], output: "StepOutput"
    ) -> Raw:
        if self.device == "cpu":
            return Raw(units, output.outputs, output.experts_LTK, output.cu_tokens)
        return Raw(
            units,
            {task: (_to_host(rows), _to_host(cu)) for task, (rows, cu) in output.outputs.items()},
            _to_host(output.experts_LTK),
            _to_host(output.cu_tokens),
        )

    def _split(self, raw: Raw) -> Iterator[tuple[Span | Chunks, Answer]]:
        experts, cu_tokens = raw.experts_LTK.numpy(), raw.cu_tokens.numpy()
        base = 0  # sequences of the tasks before this one
        for task, units in raw.units.items():
            outputs, cu_rows = (each.numpy() for each in raw.outputs[task])
            first = 0
            for unit in units:
                last = first + (unit.last - unit.first if isinstance(unit, Span) else 1)
                tokens = slice(cu_tokens[base + first], cu_tokens[base + last])
                yield (
                    unit,
                    Answer(
                        outputs=outputs[cu_rows[first] : cu_rows[last]],
                        lengths=np.diff(cu_rows[first : last + 1]),
                        tokens_per_expert=_count_experts(experts[:, tokens], self.num_experts),
                    ),
                )
                first = last
            base += first


def offsets(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the offsets of consecutive pieces, int32 [B+1], from their lengths."""
    cu_seqlens = np.zeros(lengths.size + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return cu_seqlens


def _units(part: Slice) -> Iterator[Span | Chunks]:
    """Return what a slice runs: runs of whole sequences, and pieces of long ones."""
    work = part.job.work
    if not work.is_cut:  # pieces are sequences
        yield Span(part, part.first, part.last)
        return
    is_whole = work.is_whole
    for whole, run in groupby(range(part.first, part.last), key=lambda piece: is_whole[piece]):
        pieces = work.sequence[list(run)]
        if whole:
            yield Span(part, int(pieces[0]), int(pieces[-1]) + 1)
            continue
        for number in dict.fromkeys(pieces.tolist()):
            first, last = np.searchsorted(work.sequence, [number, number + 1]).tolist()
            until = min(last, part.last)
            yield Chunks(part, number, until - first, until == last)


def _to_host(tensor: Tensor) -> Tensor:
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return staged.copy_(tensor, non_blocking=True)


def _count_experts(experts: NDArray[np.int32], num_experts: int) -> NDArray[np.int64]:
    """Return int64 [L, E] from the experts chosen, int32 [L, T, K]."""
    num_layers = experts.shape[0]
    cell = experts + num_experts * np.arange(num_layers)[:, None, None]
    counts = np.bincount(cell.ravel(), minlength=num_layers * num_experts)
    return counts.reshape(num_layers, num_experts)
