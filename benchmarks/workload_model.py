"""Adapter and head of ``benchmarks.workload``.

Legend: R rows, T tokens, D model, B sequences.
"""

import torch
from torch import Tensor, nn

from benchmarks.workload import NUM_COLUMNS, NUM_GLOBAL, WINDOW
from core_model.config import MoEConfig
from core_model.packing import Encoded, RaggedBatch, segment_ids
from kernels.attention import AttentionPattern


class TokenAdapter(nn.Module):
    """A row is a token."""

    pattern = AttentionPattern(WINDOW, NUM_GLOBAL)

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.project = nn.Linear(NUM_COLUMNS, config.d_model)

    def forward(self, batch: RaggedBatch) -> Encoded:
        """Return one token per row, one span per sequence."""
        tokens_TD = self.project(batch.features.to(self.project.weight.dtype))
        return Encoded(tokens_TD, batch.cu_seqlens, batch.cu_seqlens, {}, self.pattern)


class MeanHead(nn.Module):
    """The mean over a sequence, as one number."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.read = nn.Linear(config.d_model, 1)

    def forward(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return one row per sequence [B, 1] and the offsets 0 .. B."""
        cu, num = encoded.cu_tokens, encoded.cu_tokens.numel() - 1
        value_T = self.read(tokens_TD).float()
        total_B = value_T.new_zeros(num, 1).index_add_(
            0, segment_ids(cu, tokens_TD.shape[0]), value_T
        )
        lengths_B = (cu[1:] - cu[:-1]).unsqueeze(1)
        return total_B / lengths_B, torch.arange(num + 1, dtype=torch.int32, device=cu.device)
