"""Balanced experts, with or without an auxiliary loss, and how balance is measured.

The selection bias of an expert moves against the sign of its load error
(Wang et al. 2024, arXiv:2408.15664, algorithm 1); that is the usual way.  ``BalanceLoss`` is
the other one: a loss that moves the routers.  Tokens may carry weights, so that a training
sample drawn unevenly still balances the load of the traffic it stands for.

After training, ``rebalance`` solves the biases of one layer after the other on a large
sample of the traffic, which costs one forward pass.

Legend: L layers with routed experts, T tokens, D model, K chosen, E experts.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from core_model.model import MoETransformer
from core_model.moe import MoELayer
from core_model.packing import Encoded, RaggedBatch, SpanGroup
from kernels.routing import open_groups

if TYPE_CHECKING:
    from core_model.blocks import Block

SOLVE_STEPS = 300
FIRST_SOLVE_RATE = 0.05  # of a sigmoid score, at a load error of 100 %


def expert_load(experts_LTK: Tensor, num_experts: int, weights_T: Tensor | None = None) -> Tensor:
    """Return the (weighted) number of choices of each expert, float64 [L, E]."""
    layers = experts_LTK.shape[0]
    load = torch.zeros(layers, num_experts, dtype=torch.float64, device=experts_LTK.device)
    flat = experts_LTK.flatten(1).long()
    if weights_T is None:
        added = torch.ones_like(flat, dtype=torch.float64)
    else:
        added = weights_T.double().repeat_interleave(experts_LTK.shape[2]).expand_as(flat)
    return load.scatter_add_(1, flat, added)


def utilisation(load_LE: Tensor) -> Tensor:
    """Return mean load / max load per layer, 1 at perfect balance, [L]."""
    return load_LE.mean(dim=1) / load_LE.max(dim=1).values.clamp(min=1e-12)


@torch.no_grad()
def measure_utilisation(model: MoETransformer, task: str, batches: Iterable[RaggedBatch]) -> Tensor:
    """Return mean load / max load per layer over a task's sequences, [L]; ends in evaluation."""
    model.eval()
    load_LE = torch.zeros(len(model.moe_layers), model.config.num_experts, dtype=torch.float64)
    for batch in batches:
        experts_LTK = model.encode_and_run({task: batch}).experts_LTK
        load_LE += expert_load(experts_LTK, model.config.num_experts).cpu()
    return utilisation(load_LE)


def uniform_utilisation(
    num_tokens: int, num_experts: int, num_chosen: int, *, draws: int = 1000, seed: int = 0
) -> float:
    """Return the expected mean load / max load of a step whose tokens choose at random.

    Exact draws of the loads, expert by expert: of the tokens that have j choices left among n
    experts, each takes the next one with probability j / n.  So time does not grow with tokens.

    Args:
        num_tokens: Of the step, from 1.
        num_experts: E.
        num_chosen: K different experts for each token.
        draws: Steps drawn.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    left = np.zeros((num_chosen + 1, draws), dtype=np.int64)  # tokens by choices left
    left[num_chosen] = num_tokens
    load = np.zeros((draws, num_experts), dtype=np.int64)
    for expert in range(num_experts):
        chance = np.arange(num_chosen + 1) / (num_experts - expert)
        took = generator.binomial(left, np.minimum(chance, 1.0)[:, None])
        load[:, expert] = took.sum(axis=0)
        left -= took
        left[:-1] += took[1:]
    return float(utilisation(torch.from_numpy(load).double()).mean())


class BalanceLoss:
    """The auxiliary loss of what a model computes in training while this is open.

        loss = weight * mean over layers of sum_e f_e p_e

    f_e is the load of expert e over the mean load and has no gradient; p_e is the mean over
    tokens of the expert's share in the sum of a token's scores.  Balance gives ``weight``.

    Args:
        model: In training.
        weight: Of the loss; 0 computes none.

    Source:
        GShard, arXiv:2006.16668, algorithm 1, with the sigmoid scores and the K choices of
        DeepSeek-V3, arXiv:2412.19437, eq. 17-20.
    """

    def __init__(self, model: MoETransformer, weight: float) -> None:
        self._layers = model.moe_layers if weight != 0.0 else ()
        self._weight = weight
        self._seen: list[tuple[MoELayer, Tensor, Tensor]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._hooks = [layer.register_forward_hook(self._see) for layer in self._layers]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self, weights_T: Tensor | None = None) -> Tensor:
        """Return the loss of what was computed since the last call, a scalar.

        Args:
            weights_T: How much traffic each token stands for; None = all the same.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return torch.zeros(())
        losses = [_layer_loss(*each, weights_T) for each in seen]
        return self._weight * torch.stack(losses).mean()

    def _see(self, layer: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            self._seen.append((cast("MoELayer", layer), inputs[0], output[1]))


def _layer_loss(
    layer: MoELayer, x_TD: Tensor, experts_TK: Tensor, weights_T: Tensor | None
) -> Tensor:
    score_TE = layer.router_logits(x_TD).sigmoid()
    share_TE = score_TE / score_TE.sum(dim=1, keepdim=True)
    load_E = expert_load(experts_TK.unsqueeze(0), share_TE.shape[1], weights_T)[0]
    weights_T = share_TE.new_ones(len(share_TE)) if weights_T is None else weights_T.to(share_TE)
    mean_share_E = weights_T @ share_TE / weights_T.sum()
    return (load_E / load_E.mean()).to(share_TE) @ mean_share_E


@torch.no_grad()
def move_bias(model: MoETransformer, task: str, load_LE: Tensor, rate: float) -> None:
    """Shift each expert's selection bias for a task by ``rate`` toward the mean load."""
    place = model.place_of(task)
    step = torch.sign(load_LE.mean(dim=1, keepdim=True) - load_LE).float() * rate
    for moe, step_E in zip(model.moe_layers, step, strict=True):
        bias_E = moe.expert_bias[place]
        bias_E += step_E
        bias_E -= bias_E.mean()


def solve_bias(
    scores_TE: Tensor, bias_E: Tensor, num_chosen: int, num_groups: int = 1, chosen_groups: int = 1
) -> Tensor:
    """Return the selection bias under which all experts get the same load, [E].

    The step toward the mean is proportional to the relative load error and shrinks.
    The counts are those of ``kernels.routing.route``.
    """
    bias_E = bias_E.clone()
    num_experts = bias_E.numel()
    mean = scores_TE.shape[0] * num_chosen / num_experts
    for update in range(SOLVE_STEPS):
        keys_TE = open_groups(scores_TE + bias_E, num_groups, chosen_groups)
        chosen = torch.topk(keys_TE, num_chosen, dim=1).indices
        load_E = torch.bincount(chosen.flatten(), minlength=num_experts)
        error_E = ((mean - load_E) / mean).clamp(-1.0, 1.0)
        bias_E += FIRST_SOLVE_RATE * (1.0 - update / SOLVE_STEPS) * error_E
    return bias_E - bias_E.mean()


@torch.no_grad()
def rebalance(model: MoETransformer, task: str, packs: Iterable[Encoded]) -> None:
    """Set only the selection biases of a task so that a sample of its traffic loads experts alike.

    Args:
        model: In evaluation mode; weights stay as they are.
        task: Whose biases.
        packs: The sample, as its adapter gives it.
    """
    place = model.place_of(task)
    streams: list[tuple[Tensor, Tensor | None, SpanGroup]] = [
        (pack.tokens_TD, None, pack.spans) for pack in packs
    ]
    for each in model.blocks:
        block = cast("Block", each)
        moe = block.moe
        inputs = [block.attend(branch, residual, [spans]) for branch, residual, spans in streams]
        if isinstance(moe, MoELayer):
            scores_TE = torch.cat([torch.sigmoid(moe.router_logits(x_TD)) for x_TD, _ in inputs])
            counts = (moe.num_chosen, moe.num_groups, moe.chosen_groups)
            bias_E = moe.expert_bias[place]
            bias_E.copy_(solve_bias(scores_TE, bias_E, *counts))
        streams = [
            (moe(x_TD, place)[0], residual_TD, spans)
            for (x_TD, residual_TD), (_, _, spans) in zip(inputs, streams, strict=True)
        ]
