"""What boxes upload, read and refused; the index of it."""

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from apps.console.bundles import Terms
from apps.console.index import MessageIndex, Place
from apps.console.machines import thin
from apps.console.uploads import Event, Forecast, Telemetry, moment_of, parse_upload
from apps.maintenance.sync.boxes import save_messages
from apps.maintenance.sync.database import Database

FORECAST: Mapping[str, Any] = {
    "kind": "forecast",
    "machine": "m1",
    "time": "2026-01-01T00:00:00Z",
    "version": "forecast-both-1",
    "hazard": [[0.1, 0.2], [0.05, 0.4]],
    "life": [30.0, 40.0, 50.0],
}


def test_a_forecast_is_read() -> None:
    found = parse_upload(FORECAST)
    assert isinstance(found, Forecast)
    assert (found.machine, found.peak, found.moment) == ("m1", 0.4, 1767225600.0)


def test_the_deployment_says_itself_what_its_hazards_are_of() -> None:
    said = {"components": ["pump", "drive"], "horizons_h": [4, 48], "alert_horizon_h": 48}
    found = parse_upload({**FORECAST, **said, "threshold": 0.2})
    assert isinstance(found, Forecast)
    assert found.terms == Terms(["pump", "drive"], [4, 48], 1, 0.2)
    for wrong in ({"components": ["pump"]}, {"alert_horizon_h": 5}, {"threshold": None}):
        with pytest.raises(ValueError, match="expected"):
            parse_upload({**FORECAST, **said, "threshold": 0.2, **wrong})


def test_an_event_may_be_of_a_machine() -> None:
    body = {"kind": "event", "event": "error", "detail": "E1", "time": FORECAST["time"]}
    found = [parse_upload(each) for each in (body, {**body, "machine": "m1"})]
    assert [each.machine for each in found if isinstance(each, Event)] == ["", "m1"]


def test_what_a_sensor_did_not_measure_stays_unknown() -> None:
    body = {**FORECAST, "kind": "telemetry", "values": {"vibration": 1.5, "pressure": None}}
    found = parse_upload(body)
    assert isinstance(found, Telemetry)
    assert found.values == {"vibration": 1.5, "pressure": None}


def test_a_time_without_a_zone_is_utc() -> None:
    assert moment_of("2026-01-01 01:00:00") == moment_of("2026-01-01T02:00:00+01:00")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machine", ""),
        ("machine", "m" * 201),
        ("machine", None),
        ("time", "yesterday"),
        ("time", 5),
        ("version", 1),
        ("hazard", []),
        ("hazard", [[]]),
        ("hazard", [[0.1], [0.1, 0.2]]),
        ("hazard", [[math.nan]]),
        ("hazard", [[1.5]]),
        ("hazard", [[True]]),
        ("life", [1.0, 2.0]),
        ("life", [1.0, 2.0, math.inf]),
    ],
)
def test_a_malformed_forecast_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"expected|Invalid isoformat"):
        parse_upload({**FORECAST, field: value})


def test_the_index_takes_in_what_has_come_since(database: Database) -> None:
    index = MessageIndex(database)
    index.catch_up()
    save_messages(database, "a", [{"seq": 1, "body": FORECAST}])
    index.catch_up()
    later = {**FORECAST, "time": "2026-01-01T03:00:00Z", "hazard": [[0.9, 0.95]]}
    save_messages(database, "a", [{"seq": 5, "body": later}])
    save_messages(database, "b", [{"seq": 1, "body": {**FORECAST, "kind": "telemetry"}}])
    index.catch_up()
    assert [place.seq for place in index.places("a", "m1", "forecast", 0.0)] == [1, 5]
    assert index.newest("a", "m1", "forecast", 1) == [5]
    assert index.bodies("a", [5]) == [later]
    assert index.malformed() == {"b": 1}
    with database.transaction() as db:
        latest = db.execute("SELECT seq, peak FROM console_machines").fetchall()
    assert [tuple(row) for row in latest] == [(5, 0.95)]


def test_a_second_index_goes_on_where_the_first_ended(database: Database) -> None:
    save_messages(database, "a", [{"seq": 1, "body": {**FORECAST, "life": "long"}}])
    MessageIndex(database).catch_up()
    again = MessageIndex(database)
    again.catch_up()
    assert again.malformed() == {"a": 1}


def test_more_messages_than_one_transaction_takes(database: Database) -> None:
    messages = [{"seq": seq, "body": json.loads(json.dumps(FORECAST))} for seq in range(1, 4502)]
    save_messages(database, "a", messages)
    index = MessageIndex(database)
    index.catch_up()
    assert len(index.places("a", "m1", "forecast", 0.0)) == 4501


def test_thinning_keeps_peaks_and_the_newest() -> None:
    places = [Place(seq, float(seq), 0.9 if seq == 777 else 0.1) for seq in range(2000)]
    kept = thin(places, 100)
    assert len(kept) == 100
    assert 777 in [place.seq for place in kept]
    assert kept[-1].seq == 1999
    assert [place.seq for place in kept] == sorted({place.seq for place in kept})
    assert thin(places[:100], 100) == places[:100]
