"""One step on the device: pack slices of many requests, run the model, split the answers.

Sequences are packed task by task, end to end; nothing is padded.  The split is exact:
outputs and routed experts go to the request whose sequence made them.

Legend: R rows, B sequences, T tokens, L layers, K chosen experts, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.scheduler import Slice, Step
from cluster.schemas import SequenceStatus
from core_model.packing import RaggedBatch
from core_model.tasks import TaskSpec

if TYPE_CHECKING:
    from core_model.model import StepOutput

Model = Callable[[Mapping[str, RaggedBatch]], "StepOutput"]


@dataclass(frozen=True, slots=True, eq=False)
class SliceResult:
    """The answer to one slice.

    Args:
        outputs: Output rows of its sequences [R_out, D_out].
        lengths: Output rows of each sequence, int32 [B].
        tokens_per_expert: Its routed (token, choice) pairs, int64 [L, E].
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
class StepRunner:
    """Runs steps of one loaded model.

    Args:
        model: The model in eval mode, on ``device``.
        tasks: What the model serves.
        num_experts: Routed experts per layer, E.
        device: Where the model lives.
    """

    model: Model
    tasks: Mapping[str, TaskSpec]
    num_experts: int
    device: str = "cpu"

    def run(self, step: Step) -> Mapping[Slice, SliceResult]:
        """Run one step; called on the executor thread only."""
        by_task = {
            task: list(parts) for task, parts in groupby(sorted(step, key=_task_of), key=_task_of)
        }
        with torch.inference_mode():
            batches = {task: self._pack(task, parts) for task, parts in by_task.items()}
            return _split(self.model(batches), by_task, self.num_experts)

    def _pack(self, task: str, parts: Sequence[Slice]) -> RaggedBatch:
        lengths = [np.diff(part.job.request.cu_seqlens)[part.first : part.last] for part in parts]
        features = [part.job.request.features[_rows(part)] for part in parts]
        extras = {
            name: [
                part.job.request.extras[name][
                    _rows(part) if extra.per == "row" else slice(part.first, part.last)
                ]
                for part in parts
            ]
            for name, extra in self.tasks[task].extras.items()
        }
        return RaggedBatch(
            features=self._to_device(features),
            cu_seqlens=self._to_device([offsets(np.concatenate(lengths))]),
            extras={name: self._to_device(arrays) for name, arrays in extras.items()},
        )

    def _to_device(self, arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(self.device)


def offsets(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the offsets of consecutive pieces, int32 [B+1], from their lengths."""
    cu_seqlens = np.zeros(lengths.size + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return cu_seqlens


def _task_of(part: Slice) -> str:
    return part.job.request.task


def _rows(part: Slice) -> slice:
    cu_seqlens = part.job.request.cu_seqlens
    return slice(int(cu_seqlens[part.first]), int(cu_seqlens[part.last]))


def _split(
    output: "StepOutput", by_task: Mapping[str, Sequence[Slice]], num_experts: int
) -> Mapping[Slice, SliceResult]:
    experts = output.experts_LTK.cpu().numpy()
    cu_tokens = output.cu_tokens.cpu().numpy()
    results = {}
    base = 0  # sequences of the tasks before this one
    for task, parts in by_task.items():
        outputs, cu_rows = (each.cpu().numpy() for each in output.outputs[task])
        first = 0
        for part in parts:
            last = first + part.last - part.first
            tokens = slice(cu_tokens[base + first], cu_tokens[base + last])
            results[part] = SliceResult(
                outputs=outputs[cu_rows[first] : cu_rows[last]],
                lengths=np.diff(cu_rows[first : last + 1]),
                tokens_per_expert=_count_experts(experts[:, tokens], num_experts),
            )
            first = last
        base += first
    return results


def _count_experts(experts: NDArray[np.int32], num_experts: int) -> NDArray[np.int64]:
    """Return int64 [L, E] from the experts chosen, int32 [L, T, K]."""
    num_layers = experts.shape[0]
    cell = experts + num_experts * np.arange(num_layers)[:, None, None]
    counts = np.bincount(cell.ravel(), minlength=num_layers * num_experts)
    return counts.reshape(num_layers, num_experts)
