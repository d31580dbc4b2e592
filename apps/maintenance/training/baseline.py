"""LightGBM as the baseline: the published columns, a class per component, one fit per horizon.

Its settings are those of the C-MAPSS recipe; with the library's own the rare classes of the
4 h horizon diverge (docs/log.md).  Threshold tuning is the same as ours: the caution is chosen
on cross-fitted probabilities of the training time.

Legend: N rows, F columns, C components.
"""

from collections.abc import Mapping
from typing import Any

import lightgbm
import numpy as np

from apps.maintenance.features import log_features
from apps.maintenance.fleet import Floats, Floats32, Ints
from apps.maintenance.inputs import SUMMARY_HOURS, telemetry_summaries
from apps.maintenance.splits import Part

PARAMETERS: Mapping[str, Any] = {
    "n_estimators": 200,
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_child_samples": 60,
    "subsample": 0.7,
    "subsample_freq": 1,
    "colsample_bytree": 0.4,
    "reg_lambda": 5,
    "verbose": -1,
}
NUM_FOLDS = 4
NUM_CLASSES = 5


def baseline_columns(part: Part) -> Floats32:
    """Return the 32 log columns, and means of the sensors where the input has telemetry."""
    logs = log_features(part.fleet, part.rows)
    if np.isnan(part.fleet.telemetry).all():
        return logs
    no_visit = np.full(part.rows.size, np.nan, np.float32)
    means = telemetry_summaries(part.fleet.telemetry, part.rows, no_visit)[: len(SUMMARY_HOURS)]
    return np.concatenate([logs, *means], axis=1)


def fit_classes(columns: Floats32, truth: Ints, seed: int, threads: int) -> lightgbm.Booster:
    """Fit on rows and their labels."""
    model = lightgbm.LGBMClassifier(**PARAMETERS, random_state=seed, n_jobs=threads)
    return model.fit(columns, truth).booster_


def class_probs(booster: lightgbm.Booster, columns: Floats32, classes: Ints) -> Floats:
    """Return the probability of every class [N, 1 + C]; those it never saw have none."""
    probs = np.zeros((columns.shape[0], NUM_CLASSES))
    probs[:, classes] = np.asarray(booster.predict(columns)).reshape(columns.shape[0], -1)
    return probs


def forecast_classes(
    columns: Floats32, truth: Ints, asked: Floats32, seed: int, threads: int
) -> Floats:
    """Fit on rows and return the probabilities of others, [N, 1 + C]."""
    classes = np.unique(truth)
    if classes.size == 1:
        return np.eye(NUM_CLASSES)[np.repeat(classes, asked.shape[0])]
    booster = fit_classes(columns, truth, seed, threads)
    return class_probs(booster, asked, classes)


def cross_fit_classes(
    columns: Floats32, truth: Ints, machine: Ints, seed: int, threads: int
) -> Floats:
    """Return probabilities of machines that the trees were not fitted on, [N, 1 + C]."""
    probs = np.zeros((truth.size, NUM_CLASSES))
    for fold in range(NUM_FOLDS):
        held = machine % NUM_FOLDS == fold
        probs[held] = forecast_classes(columns[~held], truth[~held], columns[held], seed, threads)
    return probs
