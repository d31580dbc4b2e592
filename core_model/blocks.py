"""One block of the stack: norm, attention, norm, mixture of experts.

The residual stream travels beside the branch output, so that each addition is
fused with the norm behind it.

Legend: T tokens, D model, H heads, d head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from core_model.config import MoEConfig
from core_model.moe import MoELayer, init_weight
from core_model.packing import SpanGroup
from kernels.attention import varlen_attention
from kernels.norm import add_rmsnorm


class Attention(nn.Module):
    """Multi-head attention inside each span, both directions."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = init_weight((3 * config.d_model, config.d_model), config.d_model)
        self.out = init_weight((config.d_model, config.d_model), config.d_model)

    def project(self, x_TD: Tensor) -> Tensor:
        """Return queries, keys and values, [T, 3, H, d]."""
        return functional.linear(x_TD, self.qkv).view(x_TD.shape[0], 3, self.num_heads, -1)

    def forward(self, x_TD: Tensor, groups: Sequence[SpanGroup]) -> Tensor:
        """Mix the tokens of each span, [T, D]."""
        sizes = [group.num_tokens for group in groups]
        mixed = [
            varlen_attention(
                qkv_T3Hd[:, 0], qkv_T3Hd[:, 1], qkv_T3Hd[:, 2], group.cu_spans, group.pattern
            )
            for qkv_T3Hd, group in zip(self.project(x_TD).split(sizes), groups, strict=True)
        ]
        mixed_THd = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
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
        self, branch_TD: Tensor, residual_TD: Tensor | None, groups: Sequence[SpanGroup]
    ) -> tuple[Tensor, Tensor]:
        """Return the input of the expert layer and the residual stream behind it."""
        x_TD, residual_TD = add_rmsnorm(branch_TD, residual_TD, self.attention_norm, self.eps)
        branch_TD = self.attention(x_TD, groups)
        return add_rmsnorm(branch_TD, residual_TD, self.moe_norm, self.eps)

    def forward(
        self,
        branch_TD: Tensor,
        residual_TD: Tensor | None,
        groups: Sequence[SpanGroup],
        num_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return branch, residual [T, D] and the chosen experts int32 [T, K]."""
        x_TD, residual_TD = self.attend(branch_TD, residual_TD, groups)
        branch_TD, experts_TK = self.moe(x_TD, num_valid)
        return branch_TD, residual_TD, experts_TK
