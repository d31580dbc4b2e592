"""The feed-forward layers: a mixture of routed experts and a shared one, or the latter alone.

Scores are sigmoids; a bias that no gradient touches is added for the selection
only, and the weights come from the unbiased scores (DeepSeek-V3, arXiv:2412.19437,
section 2.1.2).  No token is dropped.

Legend: T tokens, D model, F hidden, E experts, K chosen, O tasks.
"""

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from core_model.config import MoEConfig
from kernels.dispatch import needs_grad
from kernels.fused_moe import SharedExpert, add_shared, fused_moe, tile_rows
from kernels.routing import route_tokens
from kernels.swiglu import swiglu_ffn

Owner: TypeAlias = int | Tensor  # a task by its place in the model, or that of each token [T]


def init_weight(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """Return a parameter drawn from N(0, 1 / fan_in)."""
    return nn.Parameter(torch.randn(shape) * fan_in**-0.5)


def narrowed_in_training(x_TD: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return all in bfloat16 if they are trained on a GPU, else as they are."""
    if x_TD.is_cuda and needs_grad(x_TD, *tensors):
        return tuple(each.bfloat16() for each in (x_TD, *tensors))
    return (x_TD, *tensors)


class DenseLayer(nn.Module):
    """x -> shared(x): the layer of a block without routed experts."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.shared_gate_up = init_weight((2 * config.d_dense, config.d_model), config.d_model)
        self.shared_down = init_weight((config.d_model, config.d_dense), config.d_dense)

    def forward(
        self, x_TD: Tensor, owner: Owner = 0, num_valid: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return the layer's output [T, D], and no experts; idle tokens are computed too."""
        return swiglu_ffn(x_TD, self.shared_gate_up, self.shared_down), None


class MoELayer(nn.Module):
    """x -> shared(x) + scale * sum over the chosen experts of weight * expert(x).

    Every task has selection biases of its own, so that its tokens load the experts alike
    whatever other tasks send, and a task that comes or changes moves no other's routing.

    Args:
        config: Sizes.
        num_tasks: O.
    """

    expert_bias: Tensor

    def __init__(self, config: MoEConfig, num_tasks: int = 1) -> None:
        super().__init__()
        d, f, e = config.d_model, config.d_expert, config.num_experts
        self.num_chosen = config.num_chosen
        self.num_groups, self.chosen_groups = config.num_groups, config.chosen_groups
        self.routed_scale = config.routed_scale
        self.router = init_weight((e, d), d)
        self.register_buffer("expert_bias", torch.zeros(num_tasks, e))
        self.gate_up = init_weight((e, 2 * f, d), d)
        self.down = init_weight((e, d, f), f)
        self.shared_gate_up = init_weight((2 * config.d_shared, d), d)
        self.shared_down = init_weight((d, config.d_shared), config.d_shared)

    def router_logits(self, x_TD: Tensor) -> Tensor:
        """Return the score of each expert before the sigmoid, float32 [T, E]."""
        return functional.linear(x_TD.float(), self.router.float())

    def forward(
        self, x_TD: Tensor, owner: Owner = 0, num_valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's output [T, D] and the chosen experts int32 [T, K].

        Args:
            x_TD: Tokens.
            owner: Whose they are: a task, or that of each token, int32 [T].
            num_valid: As of ``route``; it keeps idle tokens away from the experts.
        """
        owner_T = owner if isinstance(owner, Tensor) else None
        routing = route_tokens(
            x_TD,
            self.router,
            self.expert_bias[owner] if owner_T is None else self.expert_bias,
            self.num_chosen,
            owner_T=owner_T,
            num_groups=self.num_groups,
            chosen_groups=self.chosen_groups,
            block_rows=tile_rows(len(x_TD), self.num_chosen, self.down),
            num_valid=num_valid,
        )
        shared = SharedExpert(self.shared_gate_up, self.shared_down, self.routed_scale)
        narrow_TD, gate_up, down = narrowed_in_training(x_TD, self.gate_up, self.down)
        if narrow_TD.dtype == x_TD.dtype:
            out_TD = fused_moe(x_TD, gate_up, down, routing, shared)
        else:  # the shared expert is trained in the dtype of its tokens
            routed_TD = fused_moe(narrow_TD, gate_up, down, routing).to(x_TD.dtype)
            out_TD = add_shared(x_TD, routed_TD, shared)
        return out_TD, routing.experts_TK
