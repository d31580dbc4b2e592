"""The strict protocol of failure forecasts, by cases whose answer is counted by hand."""

import numpy as np
import pytest

from apps.maintenance.cmapss import nasa_score, rmse
from apps.maintenance.protocol import decide, labels, macro_f1, tune_caution


def test_the_label_is_the_first_component_within_the_horizon() -> None:
    hours = np.array([[5, 30, 99], [25, 24, 99], [80, 90, 99]])
    assert labels(hours, 24).tolist() == [1, 2, 0]
    assert labels(hours, 4).tolist() == [0, 0, 0]
    assert labels(hours, 80).tolist() == [1, 2, 1]


def test_macro_f1_counts_every_class_once() -> None:
    truth, said = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    assert macro_f1(truth, said, 3) == pytest.approx((0.5 + 0.8 + 0.0) / 3)


def test_caution_trades_misses_for_alarms() -> None:
    probs = np.array([[0.6, 0.4], [0.55, 0.45], [0.9, 0.1], [0.95, 0.05]])
    truth = np.array([1, 1, 0, 0])
    assert decide(probs, 1.0).tolist() == [0, 0, 0, 0]
    caution = tune_caution(probs, truth, [0.1, 0.5, 0.8, 1.0])
    assert decide(probs, caution).tolist() == truth.tolist()


def test_late_forecasts_of_life_cost_more_than_early_ones() -> None:
    truth = np.array([50.0])
    assert rmse(np.array([40.0]), truth) == 10.0
    assert nasa_score(np.array([40.0]), truth) == pytest.approx(np.exp(10 / 13) - 1)
    assert nasa_score(np.array([60.0]), truth) == pytest.approx(np.exp(1) - 1)
