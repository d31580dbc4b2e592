"""Balanced experts without an auxiliary loss, and how balance is measured.

The selection bias of an expert moves against the sign of its load error
(Wang et al. 2024, arXiv:2408.15664, algorithm 1).  Tokens may carry weights, so that
a training sample drawn unevenly still balances the load of the traffic it stands for.

Legend: L layers, T tokens, K chosen, E experts.
"""

from typing import cast

import torch
from torch import Tensor

from core_model.blocks import Block
from core_model.model import MoETransformer


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
