"""One block of the stack: norm, attention, norm, mixture of experts.

The residual stream travels beside the branch output, so that each addition is
fused with the norm behind it.

Legend: T tokens, D model, H heads, d head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from core_model.config import MoEConfig
from core_model.moe import MoELayer, init_weight
from kernels.attention import AttentionPattern, varlen_attention
from kernels.norm import add_rmsnorm


class Attention(nn.Module):
    """Multi-head attention inside each span, both directions."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = init_weight((3 * config.d_model, config.d_model), config.d_model)
        self.out = init_weight((config.d_model, config.d_model), config.d_model)

    def forward(self, x_TD: Tensor, cu_spans: Tensor, pattern: AttentionPattern) -> Tensor:
        """Mix the tokens of each span, [T, D]."""
        qkv = functional.linear(x_TD, self.qkv).view(x_TD.shape[0], 3, self.num_heads, -1)
        q_THd, k_THd, v_THd = qkv.unbind(dim=1)
        mixed_THd = varlen_attention(q_THd, k_THd, v_THd, cu_spans, pattern)
        return functional.linear(mixed_THd.flatten(1), self.out)


class Block(nn.Module):
    """(branch, residual) -> (branch, residual), and the experts that each token chose."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.eps = config.rms_eps
        self.attention_norm = nn.Parameter(torch.ones(config.d_model))
        self.attention = Attention(config)
        self.moe_norm = nn.Parameter(torch.ones(config.d_model))
        self.moe = MoELayer(config)

    def attend(
        self,
        branch_TD: Tensor,
        residual_TD: Tensor | None,
        cu_spans: Tensor,
        pattern: AttentionPattern,
    ) -> tuple[Tensor, Tensor]:
        """Return the input of the expert layer and the residual stream behind it."""
        x_TD, residual_TD = add_rmsnorm(branch_TD, residual_TD, self.attention_norm, self.eps)
        branch_TD = self.attention(x_TD, cu_spans, pattern)
        return add_rmsnorm(branch_TD, residual_TD, self.moe_norm, self.eps)

    def forward(
        self,
        branch_TD: Tensor,
        residual_TD: Tensor | None,
        cu_spans: Tensor,
        pattern: AttentionPattern,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return branch, residual [T, D] and the chosen experts int32 [T, K]."""
        x_TD, residual_TD = self.attend(branch_TD, residual_TD, cu_spans, pattern)
        branch_TD, experts_TK = self.moe(x_TD)
        return branch_TD, residual_TD, experts_TK
