"""The mixture-of-experts feed-forward layer: router, routed experts, one shared expert.

Scores are sigmoids; a bias that no gradient touches is added for the selection
only, and the weights come from the unbiased scores (DeepSeek-V3, arXiv:2412.19437,
section 2.1.2).  No token is dropped.

Legend: T tokens, D model, F hidden, E experts, K chosen.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from core_model.config import MoEConfig
from kernels.grouped_ffn import grouped_ffn
from kernels.permute import combine, permute
from kernels.routing import route


def init_weight(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """Return a parameter drawn from N(0, 1 / fan_in)."""
    return nn.Parameter(torch.randn(shape) * fan_in**-0.5)


class MoELayer(nn.Module):
    """x -> shared(x) + sum over the chosen experts of weight * expert(x)."""

    expert_bias: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        d, f, e = config.d_model, config.d_expert, config.num_experts
        self.num_chosen = config.num_chosen
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
            self.router_logits(x_TD), self.expert_bias, self.num_chosen, num_valid=num_valid
        )
        rows_RD = permute(x_TD, routing.tokens_R)
        rows_RD = grouped_ffn(rows_RD, self.gate_up, self.down, routing)
        routed_TD = combine(rows_RD, routing.weights_TK, routing.rows_TK)
        gate_TF, up_TF = functional.linear(x_TD, self.shared_gate_up).chunk(2, dim=-1)
        shared_TD = functional.linear(functional.silu(gate_TF) * up_TF, self.shared_down)
        return shared_TD + routed_TD, routing.experts_TK
