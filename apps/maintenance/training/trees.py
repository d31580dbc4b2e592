"""The tree expert of the hazards: boosted trees on (row, bucket) pairs, one answer per component.

Rows of one machine never judge trees that were fitted on it: what the sequence experts see
of the trees in training is cross-fitted by machine.

Legend: N rows, H buckets, C components, F columns.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xgboost
from numpy.typing import NDArray

from apps.maintenance.fleet import Floats32, Ints
from core_model.hazard import TO_VISIT, bucket_columns
from core_model.series import ensemble_of_answers
from core_model.series_tasks import HORIZONS, NUM_HAZARDS
from kernels.trees import TreeEnsemble

NUM_FOLDS = 4
NUM_ROUNDS = 150  # 300 remember the wear of single visits, see docs/log.md
PARAMETERS: Mapping[str, Any] = {
    "objective": "binary:logistic",
    "base_score": 0.5,
    "eta": 0.05,
    "max_depth": 5,
    "min_child_weight": 2,
    "subsample": 0.7,
    "colsample_bytree": 0.8,
    "reg_lambda": 5,
    "tree_method": "hist",
}


class Lives(NamedTuple):
    """Rows with what became of them.

    Args:
        context: [N, C].
        hours: To each component's next failure [N, C].
        observed: Hours for which each row was looked after [N].
        weight: How many rows of the traffic each stands for [N].
    """

    context: Floats32
    hours: Ints
    observed: Ints
    weight: Floats32

    def take(self, kept: NDArray[np.bool_]) -> "Lives":
        """Return the rows of a mask."""
        return Lives(self.context[kept], self.hours[kept], self.observed[kept], self.weight[kept])


def bucket_rows(context: Floats32) -> Floats32:
    """Return the context with the columns of each bucket, [N, H, F]."""
    buckets = bucket_columns(torch.from_numpy(context[:, TO_VISIT])).numpy()
    repeated = np.repeat(context[:, None], buckets.shape[1], axis=1)
    return np.concatenate([repeated, buckets], axis=2)


def fit_hazard_trees(lives: Lives, seed: int, threads: int) -> xgboost.Booster:
    """Fit on all buckets that a row may still fail in and that were looked after."""
    ends = np.array(HORIZONS)[None, :, None]
    starts = np.concatenate([[0], HORIZONS[:-1]])[None, :, None]
    hours = lives.hours[:, None]
    observed = np.array(HORIZONS) <= lives.observed[:, None]
    at_risk = (hours > starts).any(axis=2) & observed
    fails = ((hours > starts) & (hours <= ends)).astype(np.float32)
    weight = np.repeat(lives.weight[:, None], len(HORIZONS), axis=1)
    data = xgboost.DMatrix(
        bucket_rows(lives.context)[at_risk], fails[at_risk], weight=weight[at_risk]
    )
    return xgboost.train({**PARAMETERS, "seed": seed, "nthread": threads}, data, NUM_ROUNDS)


def ask_trees(booster: xgboost.Booster, context: Floats32) -> Floats32:
    """Return the hazards' logits, [N, H * C]."""
    rows = bucket_rows(context).reshape(-1, context.shape[1] + 3)
    margins = booster.predict(xgboost.DMatrix(rows), output_margin=True)
    return margins.reshape(context.shape[0], NUM_HAZARDS).astype(np.float32)


def to_ensemble(booster: xgboost.Booster) -> TreeEnsemble:
    """Return a booster as the arrays that the model carries."""
    model = json.loads(bytes(booster.save_raw("json")))
    return ensemble_of_answers(model, booster.num_features())


def cross_fit(
    groups: Ints,
    width: int,
    fit: Callable[[NDArray[np.bool_]], Callable[[NDArray[np.bool_]], Floats32]],
) -> Floats32:
    """Return for each row the answer of a model that has not seen its group, [N, width].

    Args:
        groups: Machine or engine of each row [N].
        width: Columns of an answer.
        fit: Mask of rows to learn from -> (mask of rows to answer -> answers).

    Raises:
        ValueError: There are fewer groups than folds.
    """
    names, position = np.unique(groups, return_inverse=True)
    if names.size < NUM_FOLDS:
        message = f"training: expected at least {NUM_FOLDS} machines or units, got {names.size}"
        raise ValueError(message)
    answers = np.zeros((groups.size, width), np.float32)
    for fold in range(NUM_FOLDS):
        held_out = position % NUM_FOLDS == fold
        answers[held_out] = fit(~held_out)(held_out)
    return answers
