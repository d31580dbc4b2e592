"""One block of the stack: norm, attention, norm, mixture of experts.

The residual stream travels beside the branch output, so that each addition is
fused with the norm behind it.

Legend: T tokens, D model, H heads, d head width, n and r its parts without and with a position,
v width of a head's value, Q and C ranks of queries and of keys and values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from core_model.config import MoEConfig
from core_model.moe import DenseLayer, MoELayer, Owner, init_weight, narrowed_in_training
from core_model.packing import SpanGroup, segment_ids
from kernels.attention import varlen_attention
from kernels.norm import add_rmsnorm

ROTARY_BASE = 10_000.0  # Su et al. 2021 (arXiv:2104.09864), section 3.2.2


class Attention(nn.Module):
    """Multi-head attention inside each span, both directions."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = init_weight((3 * config.d_model, config.d_model), config.d_model)
        self.out = init_weight((config.d_model, config.d_model), config.d_model)

    def project(self, x_TD: Tensor, position_T: Tensor | None = None) -> Tensor:
        """Return queries, keys and values, [T, 3, H, d]; positions change nothing."""
        return functional.linear(x_TD, self.qkv).view(x_TD.shape[0], 3, self.num_heads, -1)

    def merge(self, mixed_THd: Tensor) -> Tensor:
        """Return the output from what attention gave each head, [T, D]."""
        return functional.linear(mixed_THd.flatten(1), self.out)

    def forward(self, x_TD: Tensor, groups: Sequence[SpanGroup]) -> Tensor:
        """Mix the tokens of each span, [T, D]."""
        return self.merge(mix_spans(self.project(x_TD), groups))


class LowRankAttention(nn.Module):
    """Attention whose queries, and whose keys and values, come through few dimensions.

    A part of each head's query and key is rotated by the token's position in its span, so that
    scores know distances; that part of the key is one for all heads.

    Source:
        DeepSeek-V2, arXiv:2405.04434, eq. 9-19 (section 2.1.2 and 2.1.3).
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        d, num_heads, d_kv = config.d_model, config.num_heads, config.d_nope + config.d_value
        self.num_heads, self.eps = num_heads, config.rms_eps
        self.d_nope, self.d_rope, self.d_value = config.d_nope, config.d_rope, config.d_value
        self.q_down = init_weight((config.q_rank, d), d)
        self.q_norm = nn.Parameter(torch.ones(config.q_rank))
        self.q_up = init_weight((num_heads * config.d_head, config.q_rank), config.q_rank)
        self.kv_down = init_weight((config.kv_rank, d), d)
        self.kv_norm = nn.Parameter(torch.ones(config.kv_rank))
        self.kv_up = init_weight((num_heads * d_kv, config.kv_rank), config.kv_rank)
        self.k_rope = init_weight((config.d_rope, d), d)
        self.out = init_weight((d, num_heads * config.d_value), num_heads * config.d_value)

    def project(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        """Return queries, keys and values, [T, 3, H, d]; values are padded to that width."""
        q_TQ, _ = add_rmsnorm(functional.linear(x_TD, self.q_down), None, self.q_norm, self.eps)
        kv_TC, _ = add_rmsnorm(functional.linear(x_TD, self.kv_down), None, self.kv_norm, self.eps)
        heads = (self.num_heads, -1)
        q_THd = functional.linear(q_TQ, self.q_up).unflatten(1, heads)
        kv_THd = functional.linear(kv_TC, self.kv_up).unflatten(1, heads)
        q_THn, q_THr = q_THd.split([self.d_nope, self.d_rope], dim=2)
        k_THn, v_THv = kv_THd.split([self.d_nope, self.d_value], dim=2)
        k_T1r = functional.linear(x_TD, self.k_rope).unsqueeze(1)
        q_THr, k_T1r = rotate(q_THr, position_T), rotate(k_T1r, position_T)
        q_THd = torch.cat([q_THn, q_THr], dim=2)
        k_THd = torch.cat([k_THn, k_T1r.expand_as(q_THr)], dim=2)
        v_THd = functional.pad(v_THv, (0, q_THd.shape[2] - self.d_value))
        return torch.stack([q_THd, k_THd, v_THd], dim=1)

    def merge(self, mixed_THd: Tensor) -> Tensor:
        """Return the output from what attention gave each head, [T, D]."""
        return functional.linear(mixed_THd[:, :, : self.d_value].flatten(1), self.out)

    def forward(self, x_TD: Tensor, groups: Sequence[SpanGroup]) -> Tensor:
        """Mix the tokens of each span, [T, D]."""
        position_T = torch.cat([span_positions(group) for group in groups])
        return self.merge(mix_spans(self.project(x_TD, position_T), groups))


def mix_spans(qkv_T3Hd: Tensor, groups: Sequence[SpanGroup]) -> Tensor:
    """Return what attention gives inside each span, [T, H, d]."""
    (narrow_T3Hd,) = narrowed_in_training(qkv_T3Hd)
    parts = narrow_T3Hd.split([group.num_tokens for group in groups])
    mixed = [
        varlen_attention(part[:, 0], part[:, 1], part[:, 2], group.cu_spans, group.pattern)
        for part, group in zip(parts, groups, strict=True)
    ]
    return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).to(qkv_T3Hd.dtype)


def span_positions(group: SpanGroup) -> Tensor:
    """Return the position of each token in its span, int64 [T]."""
    token_T = torch.arange(group.num_tokens, device=group.cu_spans.device)
    return token_T - group.cu_spans[segment_ids(group.cu_spans, group.num_tokens)]


def rotate(x_THr: Tensor, position_T: Tensor) -> Tensor:
    """Return pairs (i, i + r / 2) of each row turned by position * base^(-2 i / r), as ``x_THr``.

    The product of two turned rows depends on how far apart their positions are, not on where.
    """
    half = x_THr.shape[2] // 2
    index = torch.arange(half, dtype=torch.float32, device=x_THr.device)
    angle_T1h = position_T.view(-1, 1, 1) * ROTARY_BASE ** (-index / half)
    cos_T1h, sin_T1h = angle_T1h.cos(), angle_T1h.sin()
    one_THh, other_THh = x_THr.float().split(half, dim=2)
    turned = (one_THh * cos_T1h - other_THh * sin_T1h, other_THh * cos_T1h + one_THh * sin_T1h)
    return torch.cat(turned, dim=2).to(x_THr.dtype)


class Block(nn.Module):
    """(branch, residual) -> (branch, residual), and the experts that each token chose.

    Args:
        config: Sizes.
        num_tasks: How many tasks have selection biases of their own.
        is_dense: Whether its feed-forward has no routed experts.
    """

    def __init__(self, config: MoEConfig, num_tasks: int = 1, *, is_dense: bool = False) -> None:
        super().__init__()
        self.eps = config.rms_eps
        self.attention_norm = nn.Parameter(torch.ones(config.d_model))
        self.attention = LowRankAttention(config) if config.is_low_rank else Attention(config)
        self.moe_norm = nn.Parameter(torch.ones(config.d_model))
        self.moe = DenseLayer(config) if is_dense else MoELayer(config, num_tasks)

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
        owner: Owner = 0,
        num_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return branch, residual [T, D] and the chosen experts int32 [T, K], if it has any."""
        x_TD, residual_TD = self.attend(branch_TD, residual_TD, groups)
        branch_TD, experts_TK = self.moe(x_TD, owner, num_valid)
        return branch_TD, residual_TD, experts_TK
