"""Tabular adapter and head: a transaction, its history rows and the tree expert as tokens.

A sequence is one transaction: its own row, earlier rows of its card, earlier rows of
its terminal.  History rows are embedded anew in every step, so a replica keeps no
entity state.  Each transaction becomes four tokens: event, card, terminal, tree.

The tree expert is a gradient-boosted ensemble stored as arrays.  A leaf's embedding
is its path's contribution per context feature, so it means the same after a refit,
and the sum over trees explains the tree logit.

Knows: column order of a request row (``core_model.builtin_tasks``).  Does not know:
how the features come about, Kafka, thresholds.

Legend: B sequences, R rows, C context features, D model, P row width, H heads,
S segments (two histories per sequence), T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from core_model.builtin_tasks import (
    COLUMN_AGE_S,
    COLUMN_AMOUNT,
    COLUMN_FRAUD,
    COLUMN_KIND,
    COLUMN_MATURED,
    COLUMN_SAME,
    NUM_CONTEXT,
    TOKENS_PER_TRANSACTION,
)
from core_model.config import MoEConfig
from core_model.packing import RaggedBatch, segment_ids
from core_model.trees import empty_ensemble
from kernels.trees import TreeEnsemble, tree_ensemble

DAY_S = 86_400.0
AGE_KNOTS_DAYS = (0.5, 1.0, 2.0, 4.0, 7.0, 10.0, 14.0, 18.0, 21.0, 24.0, 26.0, 27.0, 28.0, 29.0, 30.0, 35.0, 45.0)
NUM_ROW_FEATURES = 12 + len(AGE_KNOTS_DAYS)
NUM_HISTORIES = 2  # of the card, of the terminal


class Encoded(NamedTuple):
    """Tokens of one task in a step, and what its head needs beside them."""

    tokens_TD: Tensor
    cu_tokens: Tensor
    tree_BC: Tensor  # column 0 the tree logit (NaN where withheld), then contributions


def signed_log(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log1p(x.abs())


def expand_rows(rows_RD: Tensor, event_amount_R: Tensor) -> Tensor:
    """Turn raw row columns into bounded inputs [R, NUM_ROW_FEATURES]."""
    age = rows_RD[:, COLUMN_AGE_S : COLUMN_AGE_S + 1] / DAY_S
    knots = torch.tensor(AGE_KNOTS_DAYS, dtype=age.dtype, device=age.device)
    amount = rows_RD[:, COLUMN_AMOUNT : COLUMN_AMOUNT + 1]
    log_amount = torch.log1p(amount)
    ratio = log_amount - torch.log1p(event_amount_R).unsqueeze(1)
    flags = rows_RD[:, [COLUMN_MATURED, COLUMN_FRAUD, COLUMN_SAME]]
    kind = rows_RD[:, COLUMN_KIND : COLUMN_KIND + 1]
    parts = [
        torch.log1p(age * 24.0) / 4.0,
        (age / 30.0).clamp(max=4.0),
        torch.sigmoid((age - knots) * 4.0),  # soft steps, six hours wide
        log_amount / 4.0,
        ratio,
        ratio.abs(),
        (amount / 220.0).clamp(max=4.0),
        flags,
        kind == 0,
        kind == 1,
        kind == 2,
    ]
    return torch.cat(parts, dim=1)


def pool_segments(
    keys_RP: Tensor, values_RP: Tensor, queries_SP: Tensor, segments_R: Tensor, num_heads: int
) -> Tensor:
    """Attention of one query per segment over the segment's rows, [S, P].

    A silent row (score 0, value 0) stands in every segment, so an empty history pools to 0.
    """
    num_segments, width = queries_SP.shape
    d_head = width // num_heads
    per_head = (keys_RP * queries_SP[segments_R]).view(-1, num_heads, d_head).sum(-1)
    scores_RH = per_head * d_head**-0.5
    index_RH = segments_R.unsqueeze(1).expand_as(scores_RH)
    peak_SH = scores_RH.new_zeros(num_segments, num_heads)
    peak_SH = peak_SH.scatter_reduce(0, index_RH, scores_RH.detach(), "amax")
    weights_RH = torch.exp(scores_RH - peak_SH[segments_R])
    total_SH = torch.exp(-peak_SH).index_add(0, segments_R, weights_RH)
    weighted = values_RP.view(-1, num_heads, d_head) * weights_RH.unsqueeze(-1)
    pooled = weighted.new_zeros(num_segments, num_heads, d_head).index_add(0, segments_R, weighted)
    return (pooled / total_SH.unsqueeze(-1)).flatten(1)


class TabularAdapter(nn.Module):
    """Ragged transactions with history -> four tokens each.

    ``extras["context"]`` [B, C] is required.  In training ``extras["tree"]`` [B, 1 + C]
    replaces the ensemble's own answer (a NaN logit withholds the tree token), because
    trees must not be trusted on rows that they were fitted on.
    """

    context_mean: Tensor
    context_std: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        d = config.d_model
        self.num_heads = config.num_heads
        self.register_buffer("context_mean", torch.zeros(NUM_CONTEXT))
        self.register_buffer("context_std", torch.ones(NUM_CONTEXT))
        for name, value in empty_ensemble(NUM_CONTEXT)._asdict().items():
            self.register_buffer(f"tree_{name}", value)
        self.context = nn.Sequential(nn.Linear(2 * NUM_CONTEXT, d), nn.GELU(), nn.Linear(d, d))
        width = d // 2
        self.rows = nn.Sequential(
            nn.Linear(NUM_ROW_FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )
        self.key_value = nn.Linear(width, 2 * width)
        self.query = nn.Linear(d, NUM_HISTORIES * width)
        self.pooled = nn.ModuleList(nn.Linear(2 * width, d) for _ in range(NUM_HISTORIES))
        self.tree = nn.Sequential(nn.Linear(1 + NUM_CONTEXT, d), nn.GELU(), nn.Linear(d, d))
        self.kind = nn.Parameter(torch.randn(TOKENS_PER_TRANSACTION, d) * 0.5)

    @property
    def ensemble(self) -> TreeEnsemble:
        return TreeEnsemble(*(getattr(self, f"tree_{name}") for name in TreeEnsemble._fields))

    def forward(self, batch: RaggedBatch) -> Encoded:
        context_BC = batch.extras["context"]
        tree_BC = batch.extras.get("tree")
        if tree_BC is None:
            logit_B, parts_BC = tree_ensemble(context_BC, self.ensemble)
            tree_BC = torch.cat([logit_B.unsqueeze(1), parts_BC], dim=1)
        event_BD = self.encode_context(context_BC)
        card_BD, terminal_BD = self.encode_history(batch, event_BD)
        tree_BD = self.tree(torch.nan_to_num(tree_BC))
        tokens = torch.stack([event_BD, card_BD, terminal_BD, tree_BD], dim=1) + self.kind
        return self.select(tokens, tree_BC)

    def encode_context(self, context_BC: Tensor) -> Tensor:
        scaled = (signed_log(context_BC) - self.context_mean) / self.context_std
        known = ~torch.isnan(scaled)
        return self.context(torch.cat([torch.nan_to_num(scaled), known.float()], dim=1))

    def encode_history(self, batch: RaggedBatch, event_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Pool card rows and terminal rows, each with its own query, [B, D] twice."""
        rows_RD, num = batch.features, batch.num_sequences
        sequence_R = segment_ids(batch.cu_seqlens, rows_RD.shape[0])
        event_amount_B = rows_RD[batch.cu_seqlens[:-1].long(), COLUMN_AMOUNT]
        hidden_RP = self.rows(expand_rows(rows_RD, event_amount_B[sequence_R]))
        key_RP, value_RP = self.key_value(hidden_RP).chunk(2, dim=1)
        segments_R = sequence_R * NUM_HISTORIES + (rows_RD[:, COLUMN_KIND] > 1).long()
        queries_SP = self.query(event_BD).view(num * NUM_HISTORIES, -1)
        pooled_SP = pool_segments(key_RP, value_RP, queries_SP, segments_R, self.num_heads)
        sums_SP = torch.zeros_like(pooled_SP).index_add(0, segments_R, hidden_RP)
        both = torch.cat([pooled_SP, signed_log(sums_SP)], dim=1).view(num, NUM_HISTORIES, -1)
        return self.pooled[0](both[:, 0]), self.pooled[1](both[:, 1])

    def select(self, tokens: Tensor, tree_BC: Tensor) -> Encoded:
        """Drop withheld tree tokens and lay the rest end to end."""
        num, per_sequence = tokens.shape[:2]
        counts = per_sequence - torch.isnan(tree_BC[:, 0]).int()
        cu_tokens = torch.zeros(num + 1, dtype=torch.int32, device=tokens.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=cu_tokens[1:])
        if self.training:
            kept = torch.ones(num, per_sequence, dtype=torch.bool, device=tokens.device)
            kept[:, -1] = ~torch.isnan(tree_BC[:, 0])
            return Encoded(tokens[kept], cu_tokens, tree_BC)
        return Encoded(tokens.flatten(0, 1), cu_tokens, tree_BC)


class TabularHead(nn.Module):
    """Gate between the tree's logit and the sequence experts' logit.

    Output columns: logit, tree logit, sequence logit, gate, contributions [C].
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.readout = nn.Linear(config.d_model, 2)
        nn.init.zeros_(self.readout.weight)
        nn.init.constant_(self.readout.bias, 0.0)

    def forward(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        event_BD = tokens_TD[encoded.cu_tokens[:-1].long()]
        sequence_B, gate_B = self.readout(event_BD).unbind(dim=1)
        withheld_B = torch.isnan(encoded.tree_BC[:, 0])
        tree_BC = torch.nan_to_num(encoded.tree_BC)
        gate_B = torch.sigmoid(gate_B).masked_fill(withheld_B, 0.0)
        logit_B = gate_B * tree_BC[:, 0] + (1.0 - gate_B) * sequence_B
        columns = [logit_B, tree_BC[:, 0], sequence_B, gate_B]
        outputs = torch.cat([torch.stack(columns, dim=1), tree_BC[:, 1:]], dim=1)
        offsets = torch.arange(outputs.shape[0] + 1, dtype=torch.int32, device=outputs.device)
        return outputs, offsets
