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
    """Fit each component on the buckets that it lived up to and that were looked after.

    A component that has failed in an earlier bucket says nothing of a later one.  Counted as
    one that lived through it, it would teach that what is about to fail never fails later.
    """
    ends = np.array(HORIZONS)[None, :, None]
    starts = np.concatenate([[0], HORIZONS[:-1]])[None, :, None]
    hours_N1C = lives.hours[:, None]
    observed_NH1 = ends[:, :, 0, None] <= lives.observed[:, None, None]
    at_risk_NHC = (hours_N1C > starts) & observed_NH1
    asked = at_risk_NHC.any(axis=2)
    fails = (hours_N1C <= ends)[asked].astype(np.float32)
    weight = np.repeat(lives.weight[:, None], len(HORIZONS), axis=1)[asked, None]
    counted: Floats32 = at_risk_NHC[asked] * weight

    def likelihood(margin: Floats32, _: xgboost.DMatrix) -> tuple[Floats32, Floats32]:
        """Gradient and Hessian of the logistic loss, 0 where a component is not at risk."""
        prob = (1.0 / (1.0 + np.exp(-margin))).astype(np.float32)
        return counted * (prob - fails), counted * prob * (1.0 - prob)

    data = xgboost.DMatrix(bucket_rows(lives.context)[asked], fails)
    settings = {**PARAMETERS, "seed": seed, "nthread": threads}
    return xgboost.train(settings, data, NUM_ROUNDS, obj=likelihood)


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
