"""The blocks as captured CUDA graphs, one per token bucket: a step becomes a few launches.

A small step on a GPU waits for the host to launch its kernels.  A graph replays them all,
at a fixed width; the tokens by which a bucket is wider than the step are idle: a span of
their own, no expert.  Small buckets are a tile of the dense products apart, so those do not
grow.  There is a graph for each attention pattern of the model's tasks.  Steps that need two
patterns (see ``core_model.packing.merge_groups``) run eagerly, and so do steps wider than the
largest bucket: there the kernels take longer than their launches.

Legend: T tokens, W width of a bucket, D model, L layers, K chosen experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core_model.model import MoETransformer
from core_model.packing import Encoded, RaggedBatch, SpanGroup
from core_model.task_graphs import Captured, TaskGraphs, capture
from core_model.tasks import registered_tasks
from kernels.attention import AttentionPattern

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

BUCKETS = (*range(64, 512, 64), *range(512, 2048, 128), *range(2048, 8193, 256))


@dataclass(slots=True)
class Slots:
    """Fixed places for the inputs of one bucket.

    Args:
        tokens_WD: Tokens, idle ones behind the step's.
        cu_spans: Span offsets, int32 [W + 1]; the idle tokens are the last span.
        num_valid: How many tokens are the step's, int32 [1].
    """

    tokens_WD: Tensor
    cu_spans: Tensor
    num_valid: Tensor

    @classmethod
    def of(cls, width: int, like: Tensor) -> "Slots":
        """Make places for tokens of the kind and device of ``like`` [any, D]."""
        return cls(
            like.new_zeros(width, like.shape[1]),
            torch.full((width + 1,), width, dtype=torch.int32, device=like.device),
            torch.zeros(1, dtype=torch.int32, device=like.device),
        )

    @property
    def width(self) -> int:
        """W."""
        return self.tokens_WD.shape[0]

    def fill(self, tokens_TD: Tensor, cu_spans: Tensor) -> None:
        """Put a step of at most W tokens in its place."""
        num_tokens, num_offsets = tokens_TD.shape[0], cu_spans.numel()
        self.tokens_WD[:num_tokens] = tokens_TD
        self.cu_spans[:num_offsets] = cu_spans
        self.cu_spans[num_offsets:] = self.width
        self.num_valid.fill_(num_tokens)

    def group(self, pattern: AttentionPattern) -> SpanGroup:
        """What the blocks need to know."""
        return SpanGroup(self.width, self.cu_spans, pattern)


class BlockGraphs:
    """Graphs of a model's blocks.

    Args:
        model: In evaluation mode; its weights stay where they are.
    """

    def __init__(self, model: MoETransformer) -> None:
        self._model = model
        self._slots: list[Slots] = []  # by bucket; the graphs of all patterns share them
        self._captured: dict[tuple[AttentionPattern, int], Captured[tuple[Tensor, Tensor]]] = {}

    @torch.inference_mode()
    def capture(self, pool: "_POOL_HANDLE") -> None:
        """Capture every bucket, widest first, so that the narrower ones use its memory."""
        like_TD = self._model.final_norm.new_empty(0, self._model.config.d_model)
        self._slots = [Slots.of(width, like_TD) for width in BUCKETS]
        for slots in reversed(self._slots):
            slots.fill(slots.tokens_WD, torch.tensor([0, slots.width], dtype=torch.int32))
            for pattern in self._model.patterns:
                self._captured[pattern, slots.width] = capture(
                    partial(
                        self._model.run_blocks,
                        slots.tokens_WD,
                        [slots.group(pattern)],
                        slots.num_valid,
                    ),
                    pool,
                )

    def run(self, tokens_TD: Tensor, groups: Sequence[SpanGroup]) -> tuple[Tensor, Tensor]:
        """Return what ``MoETransformer.run_blocks`` returns; valid until the next step."""
        num_tokens, first = tokens_TD.shape[0], groups[0]
        slots = next((each for each in self._slots if each.width >= num_tokens), None)
        if len(groups) > 1 or slots is None or first.cu_spans.numel() > num_tokens + 1:
            return self._model.run_blocks(tokens_TD, groups)
        captured = self._captured.get((first.pattern, slots.width))
        if captured is None:
            return self._model.run_blocks(tokens_TD, groups)
        slots.fill(tokens_TD, first.cu_spans)
        captured.graph.replay()
        tokens_WD, experts_LWK = captured.result
        return tokens_WD[:num_tokens], experts_LWK[:, :num_tokens]


class StepGraphs:
    """The parts of a step (see ``core_model.model.StepParts``), captured as far as they can be.

    Args:
        model: On a GPU, in evaluation mode.
    """

    def __init__(self, model: MoETransformer) -> None:
        pool = torch.cuda.graph_pool_handle()
        self._model = model
        self._blocks = BlockGraphs(model)
        self._blocks.capture(pool)
        specs = registered_tasks()
        self._tasks = {
            task: TaskGraphs(adapter, model.heads[task], specs[task], model.final_norm.device)
            for task, adapter in model.adapters.items()
            if hasattr(adapter, "fixed_tokens")
        }
        for graphs in self._tasks.values():
            graphs.capture(pool)

    def encode(self, task: str, batch: RaggedBatch) -> Encoded:
        """Run the adapter of a task."""
        graphs = self._tasks.get(task)
        return self._model.encode(task, batch) if graphs is None else graphs.encode(batch)

    def run_blocks(self, tokens_TD: Tensor, groups: Sequence[SpanGroup]) -> tuple[Tensor, Tensor]:
        """Run the blocks."""
        return self._blocks.run(tokens_TD, groups)

    def decode(self, task: str, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Run the head of a task."""
        graphs = self._tasks.get(task)
        if graphs is None:
            return self._model.decode(task, tokens_TD, encoded)
        return graphs.decode(tokens_TD, encoded)
