"""Training of the remaining-life task: trees, sequence experts and quantiles.

Legend: N rows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xgboost
from torch import Tensor

from apps.maintenance.cmapss import CAP_CYCLES, Table
from apps.maintenance.fleet import Floats32, Ints
from apps.maintenance.inputs import Series
from apps.maintenance.life_inputs import life_inputs
from apps.maintenance.training.fit import Fit, to_batch
from apps.maintenance.wear import Wear
from core_model.config import PRESETS
from core_model.hazard import LIFE_SCALE, pinball_loss
from core_model.model import MoETransformer
from core_model.series import SeriesAdapter
from core_model.series_tasks import RUL, RUL_LIVES
from core_model.training import TrainSettings, WeightedSample, predict, rebalance_task, train_task

TREES: Mapping[str, Any] = {  # shallow: deep ones recognise units, see docs/log.md
    "objective": "reg:squarederror",
    "base_score": 0.0,
    "eta": 0.03,
    "max_depth": 3,
    "min_child_weight": 60,
    "subsample": 0.7,
    "colsample_bytree": 0.6,
    "reg_lambda": 5,
    "tree_method": "hist",
}
NUM_ROUNDS = 700
SETTINGS = TrainSettings(epochs=10, batch_size=256, peak_lr=2e-3, weight_decay=0.1)
FADE_CYCLES = 40.0  # rows above the cap count less by e every so many cycles
QUANTILE_WEIGHT = 0.3  # beside the squared errors
NUM_LIVES = len(RUL_LIVES)


class LifeExamples(NamedTuple):
    """Rows with their remaining life.

    Args:
        series: Inputs.
        unit: [N].
        lives: Early life and life [N, 2].
        weight: [N].
    """

    series: Series
    unit: Ints
    lives: Floats32
    weight: Floats32

    def take(self, rows: Ints) -> "LifeExamples":
        """Return the rows named."""
        return LifeExamples(
            self.series.take(rows), self.unit[rows], self.lives[rows], self.weight[rows]
        )


def life_examples(table: Table, wear: Wear) -> LifeExamples:
    """Return all rows of training units."""
    lives = np.stack([np.minimum(table.rul, CAP_CYCLES), table.rul], axis=1).astype(np.float32)
    weight = np.exp(-np.maximum(table.rul - CAP_CYCLES, 0.0) / FADE_CYCLES).astype(np.float32)
    return LifeExamples(life_inputs(table, wear), table.unit, lives, weight)


def fit_life_trees(examples: LifeExamples, seed: int, threads: int) -> xgboost.Booster:
    """Fit early life and life."""
    data = xgboost.DMatrix(examples.series.context, examples.lives, weight=examples.weight)
    return xgboost.train({**TREES, "seed": seed, "nthread": threads}, data, NUM_ROUNDS)


def ask_life_trees(booster: xgboost.Booster, context: Floats32) -> Floats32:
    """Return early life and life [N, 2]."""
    answers: Floats32 = booster.predict(xgboost.DMatrix(context))
    return answers


def fit_life(examples: LifeExamples, tree: Floats32, fit: Fit) -> MoETransformer:
    """Train the sequence experts and the quantiles."""
    torch.manual_seed(fit.seed)
    model = MoETransformer(PRESETS[fit.preset], [RUL.name]).to(fit.device)
    batch = to_batch(examples.series, tree, fit.device)
    adapter = model.adapters[RUL.name]
    if isinstance(adapter, SeriesAdapter):
        adapter.fit_scaling(batch)
    lives_B2 = torch.from_numpy(examples.lives).to(fit.device)
    weight_B = torch.from_numpy(examples.weight).to(fit.device)

    def loss(outputs: Tensor, chosen: Tensor) -> Tensor:
        """Squared errors of the sequence experts, and the quantiles of early life."""
        weight = weight_B[chosen] / weight_B[chosen].sum()
        sequence = outputs[:, 2 * NUM_LIVES : 3 * NUM_LIVES]
        error = ((sequence - lives_B2[chosen]) / LIFE_SCALE).square().sum(dim=1)
        quantile = pinball_loss(outputs[:, 3 * NUM_LIVES :], lives_B2[chosen, 0]) / LIFE_SCALE
        return (weight * (error + QUANTILE_WEIGHT * quantile)).sum()

    sample = WeightedSample(RUL.name, batch, weight_B)
    train_task(model, sample, loss, fit.settings, fit.seed, lambda *_: None)
    rebalance_task(model, RUL.name, batch)
    return model


def ask_life(model: MoETransformer, series: Series, tree: Floats32, device: str) -> Floats32:
    """Return all output columns [N, 9]."""
    answers: Floats32 = predict(model, RUL.name, to_batch(series, tree, device))[0].cpu().numpy()
    return answers
