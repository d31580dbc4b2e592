"""The feed-forward layers: a mixture of routed experts and a shared one, or the latter alone.

Scores are sigmoids; a bias that no gradient touches is added for the selection
only, and the weights come from the unbiased scores (DeepSeek-V3, arXiv:2412.19437,
section 2.1.2).  No token is dropped.

Legend: T tokens, D model, F hidden, E experts, K chosen.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from core_model.config import MoEConfig
from kernels.fused_moe import fused_moe, tile_rows
from kernels.routing import route


def init_weight(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """Return a parameter drawn from N(0, 1 / fan_in)."""
    return nn.Parameter(torch.randn(shape) * fan_in**-0.5)


def _swiglu(x_TD: Tensor, gate_up_GD: Tensor, down_DF: Tensor) -> Tensor:
    gate_TF, up_TF = functional.linear(x_TD, gate_up_GD).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate_TF) * up_TF, down_DF)


class DenseLayer(nn.Module):
    """x -> shared(x): the layer of a block without routed experts."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.shared_gate_up = init_weight((2 * config.d_dense, config.d_model), config.d_model)
        self.shared_down = init_weight((config.d_model, config.d_dense), config.d_dense)

    def forward(self, x_TD: Tensor, num_valid: Tensor | None = None) -> tuple[Tensor, None]:
        """Return the layer's output [T, D], and no experts; idle tokens are computed too."""
        return _swiglu(x_TD, self.shared_gate_up, self.shared_down), None


class MoELayer(nn.Module):
    """x -> shared(x) + scale * sum over the chosen experts of weight * expert(x)."""

    expert_bias: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        d, f, e = config.d_model, config.d_expert, config.num_experts
        self.num_chosen = config.num_chosen
        self.num_groups, self.chosen_groups = config.num_groups, config.chosen_groups
        self.routed_scale = config.routed_scale
        self.router = init_weight((e, d), d)
        self.register_buffer("expert_bias", torch.zeros(e))
        self.gate_up = init_weight((e, 2 * f, d), d)
        self.down = init_weight((e, d, f), f)
        self.shared_gate_up = init_weight((2 * config.d_shared, d), d)
        self.shared_down = init_weight((d, config.d_shared), config.d_shared)

    def router_logits(self, x_TD: Tensor) -> Tensor:
        """Return the score of each expert before the sigmoid, float32 [T, E]."""
        return functional.linear(x_TD.float(), self.router.float())

    def forward(self, x_TD: Tensor, num_valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the layer's output [T, D] and the chosen experts int32 [T, K].

        ``num_valid`` (see ``route``) keeps idle tokens away from the experts.
        """
        routing = route(
            self.router_logits(x_TD),
            self.expert_bias,
            self.num_chosen,
            num_groups=self.num_groups,
            chosen_groups=self.chosen_groups,
            block_rows=tile_rows(len(x_TD), self.num_chosen, self.down),
            num_valid=num_valid,
        )
        routed_TD = fused_moe(x_TD, self.gate_up, self.down, routing)
        shared_TD = _swiglu(x_TD, self.shared_gate_up, self.shared_down)
        return torch.add(shared_TD, routed_TD, alpha=self.routed_scale), routing.experts_TK
