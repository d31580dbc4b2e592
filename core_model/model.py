"""The whole model: adapters of many tasks, one shared block stack, heads of many tasks.

One call is one step: sequences of several tasks run side by side through the same
blocks, packed end to end.

Legend: T tokens, L layers with routed experts, K chosen experts.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn

from core_model.blocks import Block
from core_model.config import MoEConfig
from core_model.moe import MoELayer, Owner
from core_model.packing import Encoded, RaggedBatch, SpanGroup, concat_cu_seqlens, merge_groups
from core_model.tasks import TaskSpec, registered_tasks
from kernels.attention import FULL, AttentionPattern
from kernels.norm import add_rmsnorm


class StepOutput(NamedTuple):
    """What one step returns.

    Args:
        outputs: Per task: output rows [R_out, D_out] and their offsets int32 [B+1].
        experts_LTK: The experts that each token chose in each layer that has any, int32 [L, T, K].
        cu_tokens: Token offsets of all sequences, tasks in the order given, int32 [sum B + 1].
    """

    outputs: Mapping[str, tuple[Tensor, Tensor]]
    experts_LTK: Tensor
    cu_tokens: Tensor


class Step(NamedTuple):
    """A step up to the heads.

    Args:
        pieces: Per task: its tokens as the blocks leave them [T_task, D].
        encoded: Per task: what its adapter made.
        experts_LTK: As in ``StepOutput``; cu_tokens: likewise.
    """

    pieces: Mapping[str, Tensor]
    encoded: Mapping[str, Encoded]
    experts_LTK: Tensor
    cu_tokens: Tensor


class BlockRunner(Protocol):
    """Another way to run the blocks, such as captured graphs."""

    def run(
        self, tokens_TD: Tensor, groups: Sequence[SpanGroup], owner: Owner
    ) -> tuple[Tensor, Tensor]:
        """Return what ``MoETransformer.run_blocks`` returns."""
        ...


class MoETransformer(nn.Module):
    """Adapters -> shared blocks -> heads.

    Args:
        config: Sizes of the shared stack.
        tasks: Names of registered tasks this model serves.
    """

    def __init__(self, config: MoEConfig, tasks: Sequence[str]) -> None:
        super().__init__()
        registry: Mapping[str, TaskSpec] = registered_tasks()
        missing = sorted(set(tasks) - set(registry))
        if missing:
            message = f"tasks: expected names among {sorted(registry)}, got {missing}"
            raise ValueError(message)
        self.config = config
        self.adapters = nn.ModuleDict({t: registry[t].build_adapter(config) for t in tasks})
        self.blocks = nn.ModuleList(
            Block(config, max(1, len(tasks)), is_dense=layer < config.dense_layers)
            for layer in range(config.num_layers)
        )
        self.final_norm = nn.Parameter(torch.ones(config.d_model))
        self.heads = nn.ModuleDict({t: registry[t].build_head(config) for t in tasks})
        self.graphs: BlockRunner | None = None

    @property
    def moe_layers(self) -> Sequence[MoELayer]:
        """The layers with routed experts, lowest first."""
        layers = (cast("Block", block).moe for block in self.blocks)
        return [layer for layer in layers if isinstance(layer, MoELayer)]

    @property
    def patterns(self) -> frozenset[AttentionPattern]:
        """The attention patterns of its tasks; an adapter that names none has full attention."""
        return frozenset(getattr(adapter, "pattern", FULL) for adapter in self.adapters.values())

    def place_of(self, task: str) -> int:
        """Return which of the selection biases are the task's."""
        return list(self.adapters).index(task)

    def narrow_blocks(self, dtype: torch.dtype) -> Self:
        """Convert the shared blocks, for a GPU; routers, adapters and heads stay float32."""
        for name, parameter in self.named_parameters():
            if (name.startswith("blocks.") and not name.endswith("router")) or name == "final_norm":
                parameter.data = parameter.data.to(dtype)
        return self

    def forward(self, batches: Mapping[str, RaggedBatch]) -> StepOutput:
        """Run one step over the packed sequences of one or more tasks."""
        step = self.encode_and_run(batches)
        outputs = {
            task: self.heads[task](piece, step.encoded[task]) for task, piece in step.pieces.items()
        }
        return StepOutput(outputs, step.experts_LTK, step.cu_tokens)

    def encode_and_run(self, batches: Mapping[str, RaggedBatch]) -> Step:
        """Run one step up to the heads, which training calls by itself."""
        encoded: dict[str, Encoded] = {
            task: self.adapters[task](batch) for task, batch in batches.items()
        }
        pieces, experts_LTK = self.run_encoded(list(encoded.items()))
        cu_tokens = concat_cu_seqlens([part.cu_tokens for part in encoded.values()])
        return Step(dict(zip(encoded, pieces, strict=True)), encoded, experts_LTK, cu_tokens)

    def run_encoded(self, parts: Sequence[tuple[str, Encoded]]) -> tuple[Sequence[Tensor], Tensor]:
        """Run what adapters made through the blocks in one call.

        Args:
            parts: Each with its task.

        Returns:
            The tokens of each part, and the chosen experts of all, int32 [L, T, K].
        """
        run = self.run_blocks if self.graphs is None else self.graphs.run
        encoded = [part for _, part in parts]
        tokens_TD, experts_LTK = run(
            torch.cat([part.tokens_TD for part in encoded]).to(self.final_norm.dtype),
            merge_groups([part.spans for part in encoded]),
            self._owner_of(parts),
        )
        tokens_TD = tokens_TD.to(encoded[0].tokens_TD.dtype)
        return tokens_TD.split([part.tokens_TD.shape[0] for part in encoded]), experts_LTK

    def _owner_of(self, parts: Sequence[tuple[str, Encoded]]) -> Owner:
        """Return whose the tokens of these parts are."""
        places = [self.place_of(task) for task, _ in parts]
        if len(set(places)) == 1:
            return places[0]
        owner_T = torch.empty(
            sum(part.tokens_TD.shape[0] for _, part in parts),
            dtype=torch.int32,
            device=self.final_norm.device,
        )
        end = 0
        for place, (_, part) in zip(places, parts, strict=True):
            start, end = end, end + part.tokens_TD.shape[0]
            owner_T[start:end] = place
        return owner_T

    def run_blocks(
        self,
        tokens_TD: Tensor,
        groups: Sequence[SpanGroup],
        owner: Owner = 0,
        num_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return normalised tokens [T, D] and the chosen experts int32 [L, T, K].

        Args:
            tokens_TD: As adapters make them.
            groups: Their spans.
            owner: Whose they are: a task by its place, or that of each token, int32 [T].
            num_valid: Tokens from there on (int32 [1]) are idle: no expert works for them.
        """
        branch_TD, residual_TD = tokens_TD, None
        chosen = []
        for block in self.blocks:
            branch_TD, residual_TD, experts_TK = block(
                branch_TD, residual_TD, groups, owner, num_valid
            )
            if experts_TK is not None:
                chosen.append(experts_TK)
        normed_TD, _ = add_rmsnorm(branch_TD, residual_TD, self.final_norm, self.config.rms_eps)
        return normed_TD, torch.stack(chosen)
