"""Tabular adapter and head: a transaction, its history rows and the tree expert as tokens.

A sequence is one transaction: its own row, earlier rows of its card, earlier rows of
its terminal.  History rows are embedded anew in every step, so a replica keeps no
entity state.  Each transaction becomes three tokens in two attention spans:

    span 1   sequence             the sequence experts' own opinion, blind to the tree
    span 2   sequence, tree       what the gate between the two reads

The tree expert is a gradient-boosted ensemble stored as arrays.  A leaf's embedding
is its path's contribution per context feature, so it means the same after a refit,
and the sum over trees explains the tree logit.

Knows: column order of a request row (``core_model.builtin_tasks``).  Does not know:
how the features come about, Kafka, thresholds.

Legend: B sequences, R rows, C context features, D model, P row width, H heads,
S segments (two histories per sequence), T tokens.
"""

import torch
from torch import Tensor, nn

from core_model.builtin_tasks import (
    COLUMN_AGE_S,
    COLUMN_AMOUNT,
    COLUMN_KIND,
    COLUMN_MATURED,
    COLUMN_RATIO,
    COLUMN_SAME,
    NUM_CONTEXT,
    TOKENS_PER_TRANSACTION,
)
from core_model.config import MoEConfig
from core_model.packing import Encoded, RaggedBatch, offsets_from_lengths, segment_ids
from core_model.trees import empty_ensemble
from kernels.trees import TreeEnsemble, tree_ensemble

DAY_S = 86_400.0
AGE_KNOTS_DAYS = (0.5, 1, 2, 4, 7, 10, 14, 18, 21, 24, 26, 27, 28, 29, 30, 35, 45)
AGE_STEPS_PER_DAY = 4.0  # soft steps at the knots are about six hours wide
AMOUNT_SCALE = 220.0  # currency units; of the order of the largest ordinary amounts
NUM_ROW_FEATURES = 15 + len(AGE_KNOTS_DAYS)
NUM_HISTORIES = 2  # of the card, of the terminal
NUM_POOLS = 3  # attention, sum, maximum
DROPOUT = 0.1
FIRST_GATE = -0.6  # logit; the sequence expert starts with a weight of .35


def signed_log(x: Tensor) -> Tensor:
    """Return sign(x) log(1 + |x|), NaN for NaN."""
    return torch.sign(x) * torch.log1p(x.abs())


def expand_rows(rows_RD: Tensor, event_amount_R: Tensor, knots: Tensor) -> Tensor:
    """Turn raw row columns into bounded inputs [R, NUM_ROW_FEATURES]; knots of the age in days."""
    age = rows_RD[:, COLUMN_AGE_S, None] / DAY_S
    amount, kind = rows_RD[:, COLUMN_AMOUNT, None], rows_RD[:, COLUMN_KIND, None]
    ratio = rows_RD[:, COLUMN_RATIO, None]
    log_ratio = torch.log(torch.nan_to_num(ratio, nan=1.0).clamp(1e-3, 1e3))
    log_amount = torch.log1p(amount)
    change = log_amount - torch.log1p(event_amount_R)[:, None]
    parts = [
        torch.log1p(age * 24.0) / 4.0,
        (age / 30.0).clamp(max=4.0),
        torch.sigmoid((age - knots) * AGE_STEPS_PER_DAY),
        log_amount / 4.0,
        (amount / AMOUNT_SCALE).clamp(max=4.0),
        change,
        change.abs(),
        log_ratio,
        torch.sigmoid((log_ratio - 1.0) * 4.0),  # a soft step at e times the card's mean
        ~torch.isnan(ratio),
        rows_RD[:, COLUMN_MATURED : COLUMN_SAME + 1],  # and fraud; a list of columns is a host copy
        kind == torch.arange(1 + NUM_HISTORIES, device=kind.device),
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
    per_head = (
        (keys_RP * queries_SP.index_select(0, segments_R)).view(-1, num_heads, d_head).sum(-1)
    )
    scores_RH = per_head * d_head**-0.5
    index_RH = segments_R.unsqueeze(1).expand_as(scores_RH)
    peak_SH = scores_RH.new_zeros(num_segments, num_heads)
    peak_SH = peak_SH.scatter_reduce(0, index_RH, scores_RH.detach(), "amax")
    weights_RH = torch.exp(scores_RH - peak_SH.index_select(0, segments_R))
    total_SH = torch.exp(-peak_SH).index_add(0, segments_R, weights_RH)
    weighted = values_RP.view(-1, num_heads, d_head) * weights_RH.unsqueeze(-1)
    pooled = weighted.new_zeros(num_segments, num_heads, d_head).index_add(0, segments_R, weighted)
    return (pooled / total_SH.unsqueeze(-1)).flatten(1)


class TabularAdapter(nn.Module):
    """Ragged transactions with history -> three tokens each.

    ``extras["context"]`` [B, C] is required.  In training ``extras["tree"]`` [B, 1 + C]
    replaces the ensemble's own answer, because trees must not be trusted on rows that
    they were fitted on; a NaN logit there leaves the second span out.
    """

    context_mean: Tensor
    context_std: Tensor
    knots: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        d, width = config.d_model, config.d_model // 2
        self.num_heads = config.num_heads
        self.register_buffer("context_mean", torch.zeros(NUM_CONTEXT))
        self.register_buffer("context_std", torch.ones(NUM_CONTEXT))
        self.register_buffer("knots", torch.tensor(AGE_KNOTS_DAYS), persistent=False)
        self.set_ensemble(empty_ensemble(NUM_CONTEXT))
        self.context = nn.Sequential(nn.Linear(2 * NUM_CONTEXT, d), nn.GELU(), nn.Linear(d, d))
        self.rows = nn.Sequential(
            nn.Linear(NUM_ROW_FEATURES, width),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(width, width),
            nn.GELU(),
        )
        self.key_value = nn.Linear(width, 2 * width)
        self.query = nn.Linear(d, NUM_HISTORIES * width)
        self.pooled = nn.Linear(NUM_HISTORIES * NUM_POOLS * width, d)
        self.tree = nn.Sequential(nn.Linear(1 + NUM_CONTEXT, d), nn.GELU(), nn.Linear(d, d))
        self.kind = nn.Parameter(torch.randn(TOKENS_PER_TRANSACTION, d) * 0.5)

    @property
    def ensemble(self) -> TreeEnsemble:
        """The installed tree expert."""
        return TreeEnsemble(*(getattr(self, f"tree_{name}") for name in TreeEnsemble._fields))

    def set_ensemble(self, ensemble: TreeEnsemble) -> None:
        """Install the tree expert."""
        for name, value in ensemble._asdict().items():
            self.register_buffer(f"tree_{name}", value)

    @torch.no_grad()
    def fit_scaling(self, context_BC: Tensor) -> None:
        """Take mean and deviation of each context feature, undefined values left out."""
        scaled = signed_log(context_BC)
        mean = torch.nanmean(scaled, dim=0)
        self.context_mean.copy_(mean)
        self.context_std.copy_(torch.nanmean((scaled - mean) ** 2, dim=0).sqrt().clamp(min=1e-3))

    def forward(self, batch: RaggedBatch) -> Encoded:
        """Return the tokens of all transactions, and the tree's answers beside them."""
        context_BC = batch.extras["context"]
        tree_BC = batch.extras.get("tree")
        if tree_BC is None:
            logit_B, parts_BC = tree_ensemble(context_BC, self.ensemble)
            tree_BC = torch.cat([logit_B.unsqueeze(1), parts_BC], dim=1)
        event_BD = self.encode_context(context_BC)
        sequence_BD = event_BD + self.encode_history(batch, event_BD)
        tree_BD = self.tree(torch.nan_to_num(tree_BC))
        tokens = torch.stack([sequence_BD, sequence_BD, tree_BD], dim=1) + self.kind
        return pack_spans(tokens, tree_BC, withhold="tree" in batch.extras)

    def encode_context(self, context_BC: Tensor) -> Tensor:
        """Embed the context features and which of them are defined, [B, D]."""
        scaled = (signed_log(context_BC) - self.context_mean) / self.context_std
        known = (~torch.isnan(scaled)).float()
        encoded: Tensor = self.context(torch.cat([torch.nan_to_num(scaled), known], dim=1))
        return encoded

    def encode_history(self, batch: RaggedBatch, event_BD: Tensor) -> Tensor:
        """Pool card rows and terminal rows, each with its own query, [B, D]."""
        rows_RD, num = batch.features, batch.num_sequences
        sequence_R = segment_ids(batch.cu_seqlens, rows_RD.shape[0])
        event_amount_B = rows_RD[batch.cu_seqlens[:-1].long(), COLUMN_AMOUNT]
        hidden_RP = self.rows(expand_rows(rows_RD, event_amount_B[sequence_R], self.knots))
        key_RP, value_RP = self.key_value(hidden_RP).chunk(2, dim=1)
        segments_R = sequence_R * NUM_HISTORIES + (rows_RD[:, COLUMN_KIND] > 1).long()
        queries_SP = self.query(event_BD).view(num * NUM_HISTORIES, -1)
        attended_SP = pool_segments(key_RP, value_RP, queries_SP, segments_R, self.num_heads)
        empty_SP = torch.zeros_like(attended_SP)
        sums_SP = empty_SP.index_add(0, segments_R, hidden_RP)
        index_RP = segments_R.unsqueeze(1).expand_as(hidden_RP)
        peaks_SP = empty_SP.scatter_reduce(0, index_RP, hidden_RP, "amax")
        pools = torch.cat([attended_SP, signed_log(sums_SP), peaks_SP], dim=1)
        encoded: Tensor = self.pooled(pools.view(num, -1))
        return encoded


def pack_spans(tokens: Tensor, tree_BC: Tensor, *, withhold: bool) -> Encoded:
    """Lay [B, 3, D] tokens end to end in spans of one and two; drop withheld second spans."""
    num, per_sequence = tokens.shape[:2]
    side = {"tree": tree_BC}
    if not withhold:
        # computed where they are needed: a copy from the host would wait for the step before
        span = torch.arange(2 * num + 1, dtype=torch.int32, device=tokens.device)
        cu_spans = span // 2 * per_sequence + span % 2
        cu_tokens, longest = cu_spans[::2].contiguous(), per_sequence - 1
        return Encoded(tokens.flatten(0, 1), cu_tokens, cu_spans, side, longest_span=longest)
    shown_B = ~torch.isnan(tree_BC[:, 0])
    lengths_B2 = torch.stack([torch.ones_like(shown_B).int(), shown_B * (per_sequence - 1)], dim=1)
    kept = torch.ones(num, per_sequence, dtype=torch.bool, device=tokens.device)
    kept[:, 1:] = shown_B.unsqueeze(1)
    spans = lengths_B2.flatten()
    return Encoded(
        tokens[kept],
        offsets_from_lengths(lengths_B2.sum(dim=1)),
        offsets_from_lengths(spans[spans > 0]),
        side,
    )


class TabularHead(nn.Module):
    """A learned gate between the tree's logit and the sequence experts' logit.

        logit = tree + gate * (sequence - tree),   gate in (0, 1)

    The sequence logit is read from the span that is blind to the tree, the gate from the
    span of both.  Where the tree is withheld (training) the sequence logit stands alone.
    Output columns: logit, tree logit, sequence logit, gate, contributions [C].
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(DROPOUT)
        self.opinion = nn.Linear(config.d_model, 1)
        self.gate = nn.Linear(2 * config.d_model, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, FIRST_GATE)

    def forward(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return one output row per transaction [B, 4 + C] and the offsets 0 .. B."""
        tokens_TD = self.dropout(tokens_TD)
        tree_BC = encoded.side["tree"]
        withheld_B = torch.isnan(tree_BC[:, 0])
        tree_BC = torch.nan_to_num(tree_BC)
        first_B = encoded.cu_tokens[:-1].long()
        second_B = torch.where(withheld_B, first_B, first_B + 1)
        third_B = torch.where(withheld_B, first_B, first_B + 2)
        sequence_B = self.opinion(tokens_TD[first_B]).squeeze(1)
        both_B2D = torch.cat([tokens_TD[second_B], tokens_TD[third_B]], dim=1)
        gate_B = torch.sigmoid(self.gate(both_B2D).squeeze(1)).masked_fill(withheld_B, 1.0)
        logit_B = tree_BC[:, 0] + gate_B * (sequence_B - tree_BC[:, 0])
        columns = torch.stack([logit_B, tree_BC[:, 0], sequence_B, gate_B], dim=1)
        offsets = torch.arange(logit_B.numel() + 1, dtype=torch.int32, device=logit_B.device)
        return torch.cat([columns, tree_BC[:, 1:]], dim=1), offsets
