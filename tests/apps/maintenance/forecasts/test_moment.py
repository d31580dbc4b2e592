"""Forecasts of an hour: one request, the variant that the inputs allow, alerts that persist."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apps.maintenance.alerts import AlertBook, Stage
from apps.maintenance.fleet import Fleet, Records
from apps.maintenance.forecasts.book import (
    load_book,
    message_of,
    rule_of,
    save_book,
    see_moment,
    see_repairs,
)
from apps.maintenance.forecasts.calibration import FILE, Calibration
from apps.maintenance.forecasts.contributions import ERRORS, SERVICE, without
from apps.maintenance.forecasts.moment import Moment, forecast_hour
from apps.maintenance.forecasts.records import as_json, as_text
from apps.maintenance.forecasts.variants import choose_variants, degrade_each
from apps.maintenance.inputs import COLUMNS, LOG_COLUMNS, TELEMETRY_COLUMNS, forecast_inputs
from apps.maintenance.protocol import HORIZONS, Rows, decide
from cluster.errors import ConfigurationError
from cluster.local import LocalClient
from cluster.schemas import InferRequest, InferResponse
from tests.apps.maintenance.forecasts.conftest import VERSION, write_model_folder

HOUR = 400


class Counting:
    """A client that counts what goes through it."""

    def __init__(self, client: LocalClient) -> None:
        self.client = client
        self.requests: list[InferRequest] = []

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        return await self.client.infer(request)


def partly_silent(fleet: Fleet) -> Fleet:
    """Machine 1 measures nothing any more, 2 has no log, 3 has neither."""
    telemetry = fleet.telemetry.copy()
    telemetry[[1, 3], HOUR - 30 :] = np.nan
    return replace(
        fleet,
        telemetry=telemetry,
        errors=of_first(2, fleet.errors),
        maintenance=of_first(2, fleet.maintenance),
    )


def of_first(num: int, records: Records) -> Records:
    kept = records.machine < num
    return Records(records.machine[kept], records.hour[kept], records.kind[kept])


def forecast(client: Counting, fleet: Fleet, calibration: Calibration) -> Moment:
    found = asyncio.run(forecast_hour(client, fleet, HOUR, calibration))
    assert found is not None
    return found


def test_one_request_asks_for_all_machines_and_the_calibrated_version(
    client: LocalClient, fleet: Fleet, calibration: Calibration
) -> None:
    counting = Counting(client)
    found = forecast(counting, fleet, calibration)
    (request,) = counting.requests
    assert (request.num_sequences, request.task, request.model_version) == (4, "forecast", VERSION)
    assert found.machines == list(fleet.machines)
    chance, hours = found.answers.chance, found.answers.hours
    assert chance.shape == (4, 4, 4)
    assert (np.diff(chance, axis=1) >= 0).all()  # a longer horizon never has a smaller chance
    assert (np.diff(hours, axis=1) >= 0).all()


def test_the_variant_is_that_of_the_inputs_and_says_how_good_it_is(
    client: LocalClient, fleet: Fleet, calibration: Calibration
) -> None:
    found = forecast(Counting(client), partly_silent(fleet), calibration)
    names = list(fleet.machines)
    assert dict(zip(found.machines, found.variants, strict=True)) == {
        names[0]: "both",
        names[1]: "logs",
        names[2]: "telemetry",
    }
    assert found.silent == [names[3]]
    text = as_text(found, calibration, 48)
    assert "inputs both: 1 machines; held-out macro F1 0.750 at 48 h" in text
    assert "inputs logs: 1 machines; accuracy not measured" in text
    assert f"no forecast, nothing known: {names[3]}" in text
    assert as_json(found, calibration)["accuracy"]["logs"] == {str(h): None for h in HORIZONS}


def test_a_variant_sends_what_training_has_seen_of_it(fleet: Fleet) -> None:
    rows = Rows(np.arange(4), np.full(4, HOUR))
    silent = partly_silent(fleet)
    variants = [name or "logs" for name in choose_variants(silent, rows)]
    series = degrade_each(forecast_inputs(silent, rows, 0), variants)
    assert np.isnan(series.context[1, TELEMETRY_COLUMNS]).all()
    assert np.isnan(series.context[2, LOG_COLUMNS]).all()
    whole = forecast_inputs(silent, rows, 0)
    np.testing.assert_array_equal(series.context[0], whole.context[0])


def test_an_hour_knows_nothing_of_what_comes_after(
    client: LocalClient, fleet: Fleet, calibration: Calibration
) -> None:
    telemetry = fleet.telemetry.copy()
    telemetry[:, HOUR + 1 :] = 0.0
    before = forecast(Counting(client), fleet, calibration)
    after = forecast(Counting(client), replace(fleet, telemetry=telemetry), calibration)
    np.testing.assert_array_equal(before.answers.chance, after.answers.chance)


def test_an_input_is_hidden_from_columns_and_rows_alike(
    fleet: Fleet, calibration: Calibration
) -> None:
    series = forecast_inputs(fleet, Rows(np.arange(4), np.full(4, HOUR)), 336)
    hidden = without(series, calibration.sensors[2], calibration)
    gone = np.isnan(hidden.context) & ~np.isnan(series.context)
    named = {COLUMNS[i] for i in np.flatnonzero(gone.any(axis=0))}
    assert named <= {f"mean_{h}h_2" for h in (3, 6, 12, 24, 48)} | {"mean_ahead_2"}
    patches = hidden.rows[:, 0] == 0
    assert np.isnan(hidden.rows[patches, 4 + 2 :: 4]).all()
    assert not np.isnan(hidden.rows[patches, 4]).all()
    codes = without(series, ERRORS, calibration).rows[:, 2]
    assert not ((codes > 0) & (codes < 5)).any()
    service = without(series, SERVICE, calibration)
    assert not (service.rows[:, 2] >= 5).any()
    assert np.isnan(service.context[:, 0]).all()


def test_what_is_known_by_one_input_alone_can_be_asked_without_it(
    client: LocalClient, fleet: Fleet, tmp_path: Path
) -> None:
    """Else the request has a sequence of no rows, and the process of a live plant ended with it."""
    silent = replace(
        fleet,
        telemetry=np.full_like(fleet.telemetry, np.nan),
        errors=of_first(0, fleet.errors),
    )
    series = forecast_inputs(silent, Rows(np.arange(4), np.full(4, HOUR)), 336)
    assert (series.rows[:, 0] == 1).all()  # service alone
    calibration = Calibration.read(write_model_folder(tmp_path, 1e-6))
    hidden = without(series, SERVICE, calibration)
    assert (np.diff(hidden.offsets) == 1).all()
    assert np.isnan(hidden.rows[:, 3:]).all()
    moment = forecast(Counting(client), silent, calibration)
    assert len(moment.machines) == 4
    book = AlertBook(rule_of(calibration))
    asyncio.run(see_moment(book, moment, calibration, client))


def test_alerts_begin_where_the_decision_does(tmp_path: Path) -> None:
    calibration = Calibration.read(write_model_folder(tmp_path, 0.25))
    rule = rule_of(calibration)
    for chance in (rule.raise_at - 0.01, rule.raise_at + 0.01):
        classes = np.array([[1.0 - chance, chance]])
        assert bool(decide(classes, 0.25)[0]) == (chance > rule.raise_at)


def test_an_alert_has_reasons_and_outlives_a_restart(
    client: LocalClient, fleet: Fleet, tmp_path: Path
) -> None:
    calibration = Calibration.read(write_model_folder(tmp_path, 1e-6))  # whatever is said, alerts
    book = AlertBook(rule_of(calibration))
    counting = Counting(client)
    moment = forecast(counting, fleet, calibration)
    begun = asyncio.run(see_moment(book, moment, calibration, counting))
    assert len(begun) == 16
    assert len(counting.requests) == 2  # the forecast, and all contributions at once
    message = message_of(begun[0])
    assert message["stage"] == Stage.RAISED
    assert set(begun[0].outlook.contributions) == {*calibration.sensors, ERRORS, SERVICE}
    save_book(book, tmp_path / "alerts.json")
    again = load_book(book.rule, tmp_path / "alerts.json")
    assert again.open == book.open
    assert asyncio.run(see_moment(again, moment, calibration, counting)) == []


def test_a_replacement_ends_an_alert(client: LocalClient, fleet: Fleet, tmp_path: Path) -> None:
    calibration = Calibration.read(write_model_folder(tmp_path, 1e-6))
    book = AlertBook(rule_of(calibration))
    moment = forecast(Counting(client), fleet, calibration)
    asyncio.run(see_moment(book, moment, calibration, client))
    at = np.array([HOUR + 5])
    repaired = replace(fleet, maintenance=Records(np.array([2]), at, np.array([1])))
    assert see_repairs(book, repaired, HOUR + 5) == []  # strictly before
    (ended,) = see_repairs(book, repaired, HOUR + 6)
    assert (ended.key, ended.stage) == ((fleet.machines[2], fleet.components[1]), Stage.CLEARED)


def test_names_are_brought_into_the_models_order(fleet: Fleet, calibration: Calibration) -> None:
    backwards = replace(
        fleet,
        sensors=list(fleet.sensors)[::-1],
        telemetry=fleet.telemetry[:, :, ::-1],
        components=list(fleet.components)[::-1],
        failures=replace(fleet.failures, kind=3 - fleet.failures.kind),
        maintenance=replace(fleet.maintenance, kind=3 - fleet.maintenance.kind),
    )
    found = calibration.align(backwards)
    np.testing.assert_array_equal(found.telemetry, fleet.telemetry)
    np.testing.assert_array_equal(found.maintenance.kind, fleet.maintenance.kind)
    with pytest.raises(ConfigurationError, match="sensors: expected those of the model"):
        calibration.align(replace(fleet, sensors=["a", "b", "c", "d"]))


def test_a_damaged_calibration_is_one_line(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, 1.0)
    (folder / FILE).write_text("{}")
    with pytest.raises(ConfigurationError, match=r"forecast\.json: expected what trimoe"):
        Calibration.read(folder)
