"""Features of rows: what counts up to t, what only before it, and the rhythm of visits."""

from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest

from apps.maintenance.features import (
    event_counts,
    hours_since,
    hours_to_service,
    log_features,
    service_period,
)
from apps.maintenance.fleet import Fleet, Records
from apps.maintenance.inputs import (
    COLUMNS,
    LOG_COLUMNS,
    NUM_PATCHES,
    PATCH_HOURS,
    TELEMETRY_COLUMNS,
    forecast_inputs,
)
from apps.maintenance.life_inputs import NUM_CHANNELS, NUM_SUMMARIES, PATCH_CYCLES
from apps.maintenance.protocol import Rows, grid_rows
from apps.maintenance.wear import NUM_COURSE
from core_model.series_tasks import FORECAST, FORECAST_CONTEXT, RUL, RUL_CONTEXT

HOURS = 200


def records(*triples: tuple[int, int, int]) -> Records:
    machine, hour, kind = (np.array(column, np.int64) for column in zip(*triples, strict=True))
    return Records.sorted(machine, hour, kind)


@pytest.fixture
def fleet() -> Fleet:
    """Two machines; the second one measures nothing until hour 100."""
    telemetry = np.random.default_rng(0).normal(100.0, 5.0, (2, HOURS, 4)).astype(np.float32)
    telemetry[1, :100] = np.nan
    return Fleet(
        start=datetime(2024, 1, 1, 6),
        num_hours=HOURS,
        machines=["a", "b"],
        models=np.array([0, 2]),
        age_years=np.array([3.0, 15.0]),
        error_names=[f"error{i}" for i in range(5)],
        components=[f"comp{i}" for i in range(4)],
        sensors=["s0", "s1", "s2", "s3"],
        errors=records((0, 12, 1), (0, 24, 1), (0, 24, 3), (1, 90, 0)),
        failures=records((0, 48, 1)),
        maintenance=records((0, -72, 0), (0, 0, 2), (0, 48, 1), (0, 96, 0), (1, 24, 3)),
        telemetry=telemetry,
    )


def test_errors_count_up_to_and_including_the_hour(fleet: Fleet) -> None:
    at = Rows(np.array([0, 0, 0]), np.array([23, 24, 36]))
    assert event_counts(fleet.errors, at, 5, 12)[:, 1].tolist() == [1.0, 1.0, 0.0]
    assert event_counts(fleet.errors, at, 5, 24)[:, 1].tolist() == [1.0, 2.0, 1.0]
    assert hours_since(fleet.errors, at, 5, strict=False)[:, 3].tolist()[1:] == [0.0, 12.0]


def test_maintenance_of_the_hour_itself_is_not_known_yet(fleet: Fleet) -> None:
    at = Rows(np.array([0, 0]), np.array([48, 49]))
    since = hours_since(fleet.maintenance, at, 4, strict=True)
    assert np.isnan(since[0, 1])  # written down in the hour of the failure
    assert since[1, 1] == 1.0
    assert since[:, 0].tolist() == [120.0, 121.0]


def test_the_baseline_has_its_32_columns(fleet: Fleet) -> None:
    columns = log_features(fleet, Rows(np.array([0]), np.array([20])))
    assert columns.shape == (1, 32)
    assert columns[0, -3:].tolist() == [3.0, 0.0, 2.0]  # age, model, 06:00 + 20 h = 02:00


def test_the_period_is_the_longest_that_divides_the_gaps(fleet: Fleet) -> None:
    assert service_period(fleet.maintenance) == 0  # one gap of three is no multiple of 48
    visits = records(*[(0, 360 * i, 0) for i in (0, 1, 3, 4)], (1, 24, 0), (1, 384, 1))
    assert service_period(visits) == 360
    assert service_period(records((0, 0, 0), (0, 100, 0), (0, 231, 1))) == 0


def test_the_coming_visit_keeps_the_rhythm_of_the_last(fleet: Fleet) -> None:
    at = Rows(np.array([0, 0, 0, 1]), np.array([49, 96, 100, 20]))
    assert hours_to_service(fleet.maintenance, at, 48)[:3].tolist() == [47.0, 48.0, 44.0]
    assert np.isnan(hours_to_service(fleet.maintenance, at, 48)[3])  # no visit yet
    assert np.isnan(hours_to_service(fleet.maintenance, at, 0)).all()


def test_columns_are_those_of_the_task() -> None:
    assert COLUMNS == FORECAST_CONTEXT
    assert FORECAST.d_task == 4 + PATCH_HOURS * 4
    assert RUL.d_task == 4 + PATCH_CYCLES * NUM_CHANNELS
    assert len(RUL_CONTEXT) == 1 + NUM_SUMMARIES * NUM_CHANNELS + NUM_COURSE
    assert not set(LOG_COLUMNS) & set(TELEMETRY_COLUMNS)


def test_the_future_changes_no_input(fleet: Fleet) -> None:
    rows = grid_rows(fleet)
    before = forecast_inputs(fleet, rows, 48)
    fleet.telemetry[:, 121:] += 50.0
    later = records((0, 12, 1), (0, 24, 1), (0, 24, 3), (0, 121, 2), (1, 90, 0))
    after = forecast_inputs(replace(fleet, errors=later), rows, 48)
    past = rows.hour <= 120
    np.testing.assert_array_equal(before.context[past], after.context[past])
    assert not np.array_equal(before.context[~past], after.context[~past], equal_nan=True)
    kept = np.flatnonzero(past)
    np.testing.assert_array_equal(before.take(kept).rows, after.take(kept).rows)


def test_what_was_not_measured_is_unknown_and_sends_no_patch(fleet: Fleet) -> None:
    asked = Rows(np.array([0, 1, 1]), np.array([99, 99, 102]))
    series = forecast_inputs(fleet, asked, 0)
    means = series.context[:, TELEMETRY_COLUMNS[:4]]
    assert np.isfinite(means[0]).all()
    assert np.isnan(means[1]).all()
    is_patch = series.rows[:, 0] == 0
    first, second = series.offsets[1:3]
    assert int(is_patch[:first].sum()) == NUM_PATCHES
    assert int(is_patch[first:second].sum()) == 0
    newest = series.rows[second:][is_patch[second:]]
    assert newest.shape[0] == 1
    np.testing.assert_array_equal(newest[0, 4:], fleet.telemetry[1, 97:103].ravel())
