"""Balanced experts without an auxiliary loss, and how balance is measured.

The selection bias of an expert moves against the sign of its load error
(Wang et al. 2024, arXiv:2408.15664, algorithm 1).  Tokens may carry weights, so that
a training sample drawn unevenly still balances the load of the traffic it stands for.

After training, ``rebalance`` solves the biases of one layer after the other on a large
sample of the traffic, which costs one forward pass.

Legend: L layers, T tokens, K chosen, E experts.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from core_model.model import MoETransformer
from core_model.packing import Encoded, SpanGroup

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
def move_bias(model: MoETransformer, load_LE: Tensor, rate: float) -> None:
    """Shift each expert's selection bias by ``rate`` toward the mean load."""
    step = torch.sign(load_LE.mean(dim=1, keepdim=True) - load_LE).float() * rate
    for layer, block in enumerate(model.blocks):
        moe = cast("Block", block).moe
        moe.expert_bias += step[layer]
        moe.expert_bias -= moe.expert_bias.mean()


def solve_bias(scores_TE: Tensor, bias_E: Tensor, num_chosen: int) -> Tensor:
    """Return the selection bias under which all experts get the same load, [E].

    The step toward the mean is proportional to the relative load error and shrinks.
    """
    bias_E = bias_E.clone()
    num_experts = bias_E.numel()
    mean = scores_TE.shape[0] * num_chosen / num_experts
    for update in range(SOLVE_STEPS):
        chosen = torch.topk(scores_TE + bias_E, num_chosen, dim=1).indices
        load_E = torch.bincount(chosen.flatten(), minlength=num_experts)
        error_E = ((mean - load_E) / mean).clamp(-1.0, 1.0)
        bias_E += FIRST_SOLVE_RATE * (1.0 - update / SOLVE_STEPS) * error_E
    return bias_E - bias_E.mean()


@torch.no_grad()
def rebalance(model: MoETransformer, packs: Iterable[Encoded]) -> None:
    """Set only the selection biases so that a sample of the traffic loads experts alike.

    Args:
        model: In evaluation mode; weights stay as they are.
        packs: The sample, as adapters give it.
    """
    streams: list[tuple[Tensor, Tensor | None, SpanGroup]] = [
        (pack.tokens_TD, None, pack.spans) for pack in packs
    ]
    for each in model.blocks:
        block = cast("Block", each)
        moe = block.moe
        inputs = [block.attend(branch, residual, [spans]) for branch, residual, spans in streams]
        scores_TE = torch.cat([torch.sigmoid(moe.router_logits(x_TD)) for x_TD, _ in inputs])
        moe.expert_bias.copy_(solve_bias(scores_TE, moe.expert_bias, moe.num_chosen))
        streams = [
            (moe(x_TD)[0], residual_TD, spans)
            for (x_TD, residual_TD), (_, _, spans) in zip(inputs, streams, strict=True)
        ]
