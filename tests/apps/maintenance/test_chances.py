"""Class probabilities from hazards, intervals, and inputs that are gone."""

import itertools

import numpy as np
import pytest

from apps.maintenance.chances import first_failure, hazard_probs
from apps.maintenance.degrade import VARIANTS, degraded, joined
from apps.maintenance.inputs import COLUMNS, LOG_COLUMNS, TELEMETRY_COLUMNS, Series
from apps.maintenance.intervals import COVERAGE, bounds, conformal_margin, covered


def test_hazards_of_two_components_give_the_chance_of_each_to_fail_first() -> None:
    probs = np.array([[[0.5, 0.2], [0.1, 0.4]]])
    first = first_failure(probs)[0]
    assert first[0].tolist() == pytest.approx([0.4, 0.5, 0.1])
    assert first[1].tolist() == pytest.approx([0.4 * 0.54, 0.5 + 0.4 * 0.1, 0.1 + 0.4 * 0.36])


def test_chances_agree_with_every_course_of_events() -> None:
    rng = np.random.default_rng(0)
    probs = rng.uniform(0.05, 0.6, (1, 3, 2))
    expected = np.zeros(3)
    for first, second in itertools.product(range(4), repeat=2):  # bucket of each; 3 = survives
        chance: float = 1.0
        for component, bucket in enumerate((first, second)):
            alive = np.prod(1.0 - probs[0, :bucket, component])
            chance *= float(alive * (probs[0, bucket, component] if bucket < 3 else 1.0))
        winner = 0 if min(first, second) == 3 else 1 if first <= second else 2
        expected[winner] += chance
    np.testing.assert_allclose(first_failure(probs)[0, 2], expected)


def test_a_longer_horizon_is_never_safer() -> None:
    logits = np.random.default_rng(1).normal(0.0, 8.0, (50, 4, 4))
    first = first_failure(hazard_probs(logits))
    np.testing.assert_allclose(first.sum(axis=2), 1.0)
    assert (np.diff(first[:, :, 0], axis=1) <= 0).all()
    assert (np.diff(first[:, :, 1:], axis=1) >= 0).all()


def test_the_margin_makes_held_out_intervals_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    centre = rng.uniform(1.0, 3.0, 4000)
    quantiles = np.stack([centre - 0.1, centre, centre + 0.1], axis=1)
    truth = centre + rng.normal(0.0, 1.0, 4000)
    margin = conformal_margin(quantiles[:2000], truth[:2000], 100.0, np.arange(2000))
    held = covered(quantiles[2000:], truth[2000:], margin, 100.0).mean()
    assert held == pytest.approx(COVERAGE, abs=0.02)
    assert covered(quantiles[2000:], truth[2000:], 0.0, 100.0).mean() < 0.2


def test_each_unit_counts_once_however_many_rows_it_has() -> None:
    rng = np.random.default_rng(3)
    wrong = rng.exponential(1.0, 400)  # all rows of a unit are wrong by as much
    rows = np.where(wrong < 1.0, 50, 2)  # those that are hard to tell have few
    unit = np.repeat(np.arange(400), rows)
    quantiles = np.zeros((unit.size, 3))
    margin = conformal_margin(quantiles, wrong[unit], np.inf, unit)
    assert np.mean(wrong <= margin) == pytest.approx(COVERAGE, abs=0.01)
    alone = conformal_margin(quantiles, wrong[unit], np.inf, np.arange(unit.size))
    assert np.mean(wrong <= alone) < 0.75


def test_an_interval_that_reaches_the_cap_is_open() -> None:
    quantiles = np.array([[2.0, 4.0, 9.9], [2.0, 4.0, 8.0]])
    low, high = bounds(quantiles, 0.5, 10.0)
    assert low.tolist() == [1.5, 1.5]
    assert high.tolist() == [np.inf, 8.5]
    assert covered(quantiles, np.array([10.0, 10.0]), 0.5, 10.0).tolist() == [True, False]


@pytest.fixture
def series() -> Series:
    """Two sequences: a patch and an event, then an event alone."""
    rows = np.zeros((3, 28), np.float32)
    rows[1:, 0] = 1.0
    context = np.arange(2 * len(COLUMNS), dtype=np.float32).reshape(2, -1)
    return Series(rows, np.array([0, 2, 3], np.int32), context)


def test_a_lost_input_is_unknown_and_the_other_stays(series: Series) -> None:
    logs = degraded(series, "logs")
    assert np.isnan(logs.context[:, TELEMETRY_COLUMNS]).all()
    np.testing.assert_array_equal(logs.context[:, LOG_COLUMNS], series.context[:, LOG_COLUMNS])
    assert logs.offsets.tolist() == [0, 1, 2]
    assert (logs.rows[:, 0] == 1.0).all()
    telemetry = degraded(series, "telemetry")
    assert np.isnan(telemetry.context[:, LOG_COLUMNS]).all()
    assert telemetry.offsets.tolist() == [0, 1, 1]
    assert degraded(series, "both") is series


def test_parts_joined_are_the_parts_one_after_the_other(series: Series) -> None:
    both = joined([degraded(series, variant) for variant in VARIANTS])
    assert both.offsets.tolist() == [0, 2, 3, 4, 5, 6, 6]
    np.testing.assert_array_equal(both.take(np.array([1])).context, series.context[1:])
