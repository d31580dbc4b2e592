"""Heads on series: hazards per component and horizon bucket, and remaining life.

A hazard is the probability that a component fails in a bucket, (0, 4], (4, 24], (24, 48]
or (48, 72] h, if it has lived up to it (discrete-time survival).  The probability of having
failed by a horizon follows by products, so a longer horizon never has a smaller one.

Legend: B sequences, D model, H buckets, C components, Q quantiles.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from core_model.config import MoEConfig
from core_model.packing import Encoded, RaggedBatch
from core_model.series import DROPOUT, SeriesAdapter
from core_model.series_tasks import (
    FORECAST_CONTEXT,
    FORECAST_SHAPE,
    HORIZONS,
    NUM_COMPONENTS,
    NUM_HAZARDS,
    QUANTILES,
    RUL_LIVES,
)

TO_VISIT = FORECAST_CONTEXT.index("to_visit_h")
NUM_BUCKET_COLUMNS = 3
FIRST_GATE = -1.0  # logit; the sequence experts start with a weight of .27
GATE_STEPS = 50
GATE_PRIOR = 0.1  # nats per squared logit of a horizon's mean gate away from the first gate
GATE_POOLING = 30.0  # nats per squared logit of a component away from it, see docs/log.md
LIFE_SCALE = 50.0  # cycles; of the order of the spread of lives


def bucket_columns(to_visit_B: Tensor) -> Tensor:
    """Return start, end and whether the coming visit lies in each bucket, [B, H, 3].

    The last is 1 or 0, NaN where no visit is due.
    """
    ends_H = torch.tensor(HORIZONS, dtype=to_visit_B.dtype, device=to_visit_B.device)
    starts_H = torch.cat([ends_H.new_zeros(1), ends_H[:-1]])
    visit_B1 = to_visit_B.unsqueeze(1)
    inside_BH = ((visit_B1 > starts_H) & (visit_B1 <= ends_H)).to(to_visit_B.dtype)
    inside_BH = torch.where(visit_B1.isnan(), torch.nan, inside_BH)
    shape = inside_BH.shape
    return torch.stack([starts_H.expand(shape), ends_H.expand(shape), inside_BH], dim=2)


def failed_by(hazard_BHC: Tensor) -> Tensor:
    """Return the probability that each component has failed by each horizon, [B, H, C].

    p[b, h, c] = 1 - prod_{i <= h} (1 - q[b, i, c]),   q = sigmoid(hazard)
    """
    return -torch.expm1(functional.logsigmoid(-hazard_BHC).cumsum(dim=1))


def hazard_loss(hazard_BHC: Tensor, hours_BC: Tensor, observed_B: Tensor) -> Tensor:
    """Return the negative log likelihood of each row [B].

    Args:
        hazard_BHC: Logits.
        hours_BC: Hours to each component's next failure, above 0; a component is at risk in
            a bucket if it fails after the bucket's start.
        observed_B: Hours for which a row was looked after; a bucket that ends later says nothing.
    """
    ends_H1 = torch.tensor(HORIZONS, device=hours_BC.device).unsqueeze(1)
    starts_H1 = torch.cat([ends_H1.new_zeros(1, 1), ends_H1[:-1]])
    hours_B1C = hours_BC.unsqueeze(1)
    is_observed = (observed_B.unsqueeze(1) >= ends_H1.T).unsqueeze(2)
    at_risk = ((hours_B1C > starts_H1) & is_observed).to(hazard_BHC.dtype)
    fails = (hours_B1C <= ends_H1).to(hazard_BHC.dtype)
    entropy = functional.binary_cross_entropy_with_logits(hazard_BHC, fails, reduction="none")
    return (entropy * at_risk).sum(dim=(1, 2))


def fit_gate(tree_BHC: Tensor, sequence_BHC: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the logit of each hazard's gate [H, C] that held-out rows favour.

    A component with few failures has about the gate of its horizon.

    Args:
        tree_BHC: Hazards of the trees.
        sequence_BHC: Those of the sequence experts.
        loss: Hazards [B, H, C] -> their summed negative log likelihood.
    """
    gate_HC = torch.full(tree_BHC.shape[1:], FIRST_GATE, requires_grad=True)
    optimizer = torch.optim.LBFGS([gate_HC], max_iter=GATE_STEPS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        hazard_BHC = tree_BHC + torch.sigmoid(gate_HC) * (sequence_BHC - tree_BHC)
        mean_H1 = gate_HC.mean(dim=1, keepdim=True)
        value = loss(hazard_BHC) + GATE_PRIOR * (mean_H1 - FIRST_GATE).square().sum()
        value = value + GATE_POOLING * (gate_HC - mean_H1).square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return gate_HC.detach()


class HazardAdapter(SeriesAdapter):
    """A series adapter whose trees are asked once for every bucket."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, FORECAST_SHAPE)

    def tree_rows(self, context_BC: Tensor) -> Tensor:
        """Return the context with the columns of each bucket, [B * H, C + 3]."""
        buckets = bucket_columns(context_BC[:, TO_VISIT])
        repeated = context_BC.unsqueeze(1).expand(-1, buckets.shape[1], -1)
        return torch.cat([repeated, buckets], dim=2).flatten(0, 1)

    def forward(self, batch: RaggedBatch) -> Encoded:
        """Return the tokens; the buckets go past the blocks to the head."""
        encoded = super().forward(batch)
        buckets = bucket_columns(batch.extras["context"][:, TO_VISIT])
        inside = torch.nan_to_num(buckets[:, :, 2], nan=0.5)
        return replace(encoded, side={**encoded.side, "buckets": inside})


class HazardHead(nn.Module):
    """Hazards of the sequence experts and of the trees under a gate per hazard; hours left.

        hazard = tree + gate * (sequence - tree),   gate in (0, 1)

    Each visit is seen by many rows, so that the sequence experts remember those they were
    fitted on; a gate learned beside them would trust them too much.  It is fitted on rows that
    neither they nor the trees have seen (``fit_gate``).

    Output columns: probability per horizon and component, quantiles of log(1 + hours to the
    machine's next failure), hazards, hazards of the sequence experts alone.
    """

    gate: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        d, num = config.d_model, len(HORIZONS)
        self.dropout = nn.Dropout(DROPOUT)
        self.outside = nn.Linear(d, NUM_HAZARDS)
        self.inside = nn.Linear(d, NUM_HAZARDS)
        self.register_buffer("gate", torch.full((num, NUM_COMPONENTS), FIRST_GATE))
        self.hours = Quantiles(3 * d)

    def forward(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return one output row per sequence and the offsets 0 .. B."""
        tokens_TD = self.dropout(tokens_TD)
        state_BD, both_B2D = read_tokens(tokens_TD, encoded)
        shape = (-1, len(HORIZONS), NUM_COMPONENTS)
        inside_BH1 = encoded.side["buckets"].unsqueeze(2)
        sequence = self.outside(state_BD).view(shape)
        sequence = sequence + inside_BH1 * self.inside(state_BD).view(shape)
        tree = encoded.side["tree"].view(shape)
        hazard = tree + torch.sigmoid(self.gate) * (sequence - tree)
        probs = failed_by(hazard)
        hours = self.hours(torch.cat([state_BD, both_B2D], dim=1))
        columns = [probs.flatten(1), hours, hazard.flatten(1), sequence.flatten(1)]
        return torch.cat(columns, dim=1), row_offsets(hazard)


class LifeHead(nn.Module):
    """Remaining life in cycles: trees and sequence experts under a gate, and its quantiles.

    Output columns: early life and life, those of the trees, those of the sequence experts,
    quantiles of early life.  The gate is fitted on held-out units, as that of hazards.
    """

    gate: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        d = config.d_model
        self.dropout = nn.Dropout(DROPOUT)
        self.opinion = nn.Linear(d, len(RUL_LIVES))
        self.register_buffer("gate", torch.full((len(RUL_LIVES),), FIRST_GATE))
        self.spread = Quantiles(3 * d)

    def forward(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return one output row per sequence and the offsets 0 .. B."""
        tokens_TD = self.dropout(tokens_TD)
        state_BD, both_B2D = read_tokens(tokens_TD, encoded)
        tree = encoded.side["tree"]
        sequence = LIFE_SCALE * (2.0 + self.opinion(state_BD))
        life = tree + torch.sigmoid(self.gate) * (sequence - tree)
        spread = LIFE_SCALE * self.spread(torch.cat([state_BD, both_B2D], dim=1))
        quantiles = tree[:, :1] + spread
        return torch.cat([life, tree, sequence, quantiles], dim=1), row_offsets(life)


class Quantiles(nn.Module):
    """Quantiles that never cross: a middle one, and steps down and up from it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, len(QUANTILES))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return [B, Q], ascending."""
        down_B, middle_B, up_B = self.linear(x_BD).unbind(1)
        low_B = middle_B - functional.softplus(down_B)
        return torch.stack([low_B, middle_B, middle_B + functional.softplus(up_B)], dim=1)


def pinball_loss(quantiles_BQ: Tensor, truth_B: Tensor) -> Tensor:
    """Return the mean quantile loss of each row [B]."""
    error_BQ = truth_B.unsqueeze(1) - quantiles_BQ
    levels_Q = torch.tensor(QUANTILES, device=error_BQ.device)
    return torch.maximum(levels_Q * error_BQ, (levels_Q - 1.0) * error_BQ).mean(dim=1)


def read_tokens(tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Return each sequence's state [B, D] and its state and tree side by side [B, 2 D]."""
    beside_B = encoded.side["beside"]
    both_B2D = torch.cat([tokens_TD[beside_B], tokens_TD[beside_B + 1]], dim=1)
    return tokens_TD[encoded.cu_tokens[:-1].long()], both_B2D


def row_offsets(rows: Tensor) -> Tensor:
    """Return 0 .. B, int32."""
    return torch.arange(rows.shape[0] + 1, dtype=torch.int32, device=rows.device)
