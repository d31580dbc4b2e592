"""The blocks as captured CUDA graphs, one per token bucket: a step becomes one launch.

A small step on a GPU waits for the host to launch its kernels.  A graph replays them all,
at a fixed width; the tokens by which a bucket is wider than the step are idle: a span of
their own, no expert.  Buckets are a tile of the dense products apart, so those do not grow.
Steps that mix attention patterns or are wider than the largest bucket run eagerly; there
the kernels take longer than their launches.

Legend: T tokens, W width of a bucket, D model, L layers, K chosen experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core_model.model import MoETransformer
from core_model.packing import SpanGroup
from kernels.attention import FULL, AttentionPattern

BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
WARM_UPS = 2  # kernels are compiled and memory is taken before the capture

Blocks = Callable[[Tensor, Sequence[SpanGroup], Tensor], tuple[Tensor, Tensor]]


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
    """Graphs of a model on a GPU, captured before its first step.

    Args:
        model: In evaluation mode; its weights stay where they are.
        pattern: The attention pattern whose steps are replayed.
    """

    def __init__(self, model: MoETransformer, pattern: AttentionPattern = FULL) -> None:
        self._model, self._pattern = model, pattern
        self._slots: list[Slots] = []
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._outputs: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every bucket, widest first, so that the narrower ones use its memory."""
        pool = None
        for width in reversed(BUCKETS):
            slots = Slots.of(width, self._model.final_norm.new_empty(0, self._model.config.d_model))
            slots.fill(slots.tokens_WD, torch.tensor([0, width], dtype=torch.int32))
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._run(slots)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = self._run(slots)
            pool = pool or graph.pool()
            self._slots.insert(0, slots)
            self._graphs.insert(0, graph)
            self._outputs.insert(0, outputs)

    def run(self, tokens_TD: Tensor, groups: Sequence[SpanGroup]) -> tuple[Tensor, Tensor]:
        """Return what ``MoETransformer.run_blocks`` returns; valid until the next step."""
        num_tokens = tokens_TD.shape[0]
        is_one = len(groups) == 1 and groups[0].pattern == self._pattern
        fitting = [i for i, slots in enumerate(self._slots) if slots.width >= num_tokens]
        if not is_one or not fitting or groups[0].cu_spans.numel() > num_tokens + 1:
            return self._model.run_blocks(tokens_TD, groups)
        index = fitting[0]
        self._slots[index].fill(tokens_TD, groups[0].cu_spans)
        self._graphs[index].replay()
        tokens_WD, experts_LWK = self._outputs[index]
        return tokens_WD[:num_tokens], experts_LWK[:, :num_tokens]

    def _run(self, slots: Slots) -> tuple[Tensor, Tensor]:
        return self._model.run_blocks(
            slots.tokens_WD, [slots.group(self._pattern)], slots.num_valid
        )
