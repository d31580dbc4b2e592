"""The blocks as captured CUDA graphs, one per token bucket: a step becomes one launch.

A small step on a GPU waits for the host to launch its kernels.  A graph replays them all,
at a fixed width; the tokens by which a bucket is wider than the step are idle: a span of
their own, no expert.  Small buckets are a tile of the dense products apart, so those do not
grow.  There is a graph for each attention pattern of the model's tasks.  Steps that need two
patterns (see ``core_model.packing.merge_groups``) run eagerly, and so do steps wider than the
largest bucket: there the kernels take longer than their launches.

The torch forms read the experts' loads on the host, so there are no graphs of them.

Legend: T tokens, W width of a bucket, D model, L layers, K chosen experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core_model.model import MoETransformer
from core_model.moe import Owner
from core_model.packing import SpanGroup
from kernels.attention import AttentionPattern
from kernels.dispatch import environment_impl

BUCKETS = (*range(64, 512, 64), *range(512, 2048, 128), *range(2048, 8193, 256))
WARM_UPS = 2  # kernels are compiled and memory is taken before the capture

Blocks = Callable[[Tensor, Sequence[SpanGroup], Tensor], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Slots:
    """Fixed places for the inputs of one bucket.

    Args:
        tokens_WD: Tokens, idle ones behind the step's.
        cu_spans: Span offsets, int32 [W + 1]; the idle tokens are the last span.
        owner_W: Whose each token is, int32.
        num_valid: How many tokens are the step's, int32 [1].
    """

    tokens_WD: Tensor
    cu_spans: Tensor
    owner_W: Tensor
    num_valid: Tensor

    @classmethod
    def of(cls, width: int, like: Tensor) -> "Slots":
        """Make places for tokens of the kind and device of ``like`` [any, D]."""
        return cls(
            like.new_zeros(width, like.shape[1]),
            torch.full((width + 1,), width, dtype=torch.int32, device=like.device),
            torch.zeros(width, dtype=torch.int32, device=like.device),
            torch.zeros(1, dtype=torch.int32, device=like.device),
        )

    @property
    def width(self) -> int:
        """W."""
        return self.tokens_WD.shape[0]

    def fill(self, tokens_TD: Tensor, cu_spans: Tensor, owner: Owner = 0) -> None:
        """Put a step of at most W tokens in its place."""
        num_tokens, num_offsets = tokens_TD.shape[0], cu_spans.numel()
        self.tokens_WD[:num_tokens] = tokens_TD
        self.cu_spans[:num_offsets] = cu_spans
        self.cu_spans[num_offsets:] = self.width
        self.owner_W[:num_tokens] = owner
        self.num_valid.fill_(num_tokens)

    def group(self, pattern: AttentionPattern) -> SpanGroup:
        """What the blocks need to know."""
        return SpanGroup(self.width, self.cu_spans, pattern)


def captured_blocks(model: MoETransformer) -> "BlockGraphs | None":
    """Return the captured graphs of a model on a GPU; None where torch forms run.

    Raises:
        ValueError: See ``environment_impl``.
    """
    if environment_impl() == "torch":
        return None
    graphs = BlockGraphs(model)
    graphs.capture()
    return graphs


class _Captured(NamedTuple):
    """A graph and where its results are."""

    graph: torch.cuda.CUDAGraph
    tokens_WD: Tensor
    experts_LWK: Tensor


class BlockGraphs:
    """Graphs of a model on a GPU, captured before its first step.

    Args:
        model: In evaluation mode; its weights stay where they are.
    """

    def __init__(self, model: MoETransformer) -> None:
        self._model = model
        self._slots: list[Slots] = []  # by bucket; the graphs of all patterns share them
        self._captured: dict[tuple[AttentionPattern, int], _Captured] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every bucket, widest first, so that the narrower ones use its memory."""
        pool = torch.cuda.graph_pool_handle()
        like_TD = self._model.final_norm.new_empty(0, self._model.config.d_model)
        self._slots = [Slots.of(width, like_TD) for width in BUCKETS]
        for slots in reversed(self._slots):
            slots.fill(slots.tokens_WD, torch.tensor([0, slots.width], dtype=torch.int32))
            for pattern in self._model.patterns:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(WARM_UPS):
                        self._run(slots, pattern)
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    outputs = self._run(slots, pattern)
                self._captured[pattern, slots.width] = _Captured(graph, *outputs)

    def run(
        self, tokens_TD: Tensor, groups: Sequence[SpanGroup], owner: Owner = 0
    ) -> tuple[Tensor, Tensor]:
        """Return what ``MoETransformer.run_blocks`` returns; valid until the next step."""
        num_tokens, first = tokens_TD.shape[0], groups[0]
        slots = next((each for each in self._slots if each.width >= num_tokens), None)
        if len(groups) > 1 or slots is None or first.cu_spans.numel() > num_tokens + 1:
            return self._model.run_blocks(tokens_TD, groups, owner)
        captured = self._captured.get((first.pattern, slots.width))
        if captured is None:
            return self._model.run_blocks(tokens_TD, groups, owner)
        slots.fill(tokens_TD, first.cu_spans, owner)
        captured.graph.replay()
        return captured.tokens_WD[:num_tokens], captured.experts_LWK[:, :num_tokens]

    def _run(self, slots: Slots, pattern: AttentionPattern) -> tuple[Tensor, Tensor]:
        owner = slots.owner_W if len(self._model.adapters) > 1 else 0
        group = slots.group(pattern)
        return self._model.run_blocks(slots.tokens_WD, [group], owner, slots.num_valid)
