"""The command: a moment, a stretch of the past, and what it refuses."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from apps.cli import build_parser
from apps.cli import main as trimoe
from apps.maintenance.fleet import Fleet
from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.forecasts.records import TABLE
from apps.maintenance.forecasts.service import ALERTS, run_live, run_past
from apps.maintenance.tables import write_fleet
from cluster.errors import ConfigurationError
from cluster.local import LocalClient
from tests.apps.maintenance.forecasts.conftest import write_model_folder


@pytest.fixture
def tables(fleet: Fleet, tmp_path: Path) -> Path:
    write_fleet(fleet, tmp_path / "tables")
    return tmp_path / "tables"


def arguments(*words: object) -> Namespace:
    return build_parser().parse_args(["maintenance", "forecast", *map(str, words)])


def test_a_moment_is_printed_and_written(
    client: LocalClient,
    calibration: Calibration,
    tables: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = arguments(tables, "--at", "2024-01-10T01:00+01:00", "--json", tmp_path / "f.json")
    assert run_past(args, client, calibration) == 0
    assert capsys.readouterr().out.startswith("2024-01-10 00:00 UTC, model forecast-test")
    found: dict[str, Any] = json.loads((tmp_path / "f.json").read_text())
    assert found["time"] == "2024-01-10T00:00:00Z"
    assert len(found["machines"]) == 4
    assert found["accuracy"]["both"]["48"]["macro_f1"] == 0.75


def test_a_stretch_keeps_every_third_hour_and_the_alerts(
    client: LocalClient, tables: Path, tmp_path: Path
) -> None:
    calibration = Calibration.read(write_model_folder(tmp_path / "model", 1e-6))
    args = arguments(
        tables, "--since", "2024-01-10T01:00", "--at", "2024-01-10T12:00", "--out", tmp_path
    )
    assert run_past(args, client, calibration) == 0
    table = pd.read_parquet(tmp_path / TABLE)
    assert sorted(table["time"].dt.hour.unique()) == [3, 6, 9, 12]
    assert len(table) == 16
    alerts = [json.loads(line) for line in (tmp_path / ALERTS).read_text().splitlines()]
    assert len([each for each in alerts if each["stage"] == "raised"]) == 16


def test_a_time_outside_the_record_is_refused(
    client: LocalClient, calibration: Calibration, tables: Path
) -> None:
    with pytest.raises(ConfigurationError, match="time: expected 2024-01-01"):
        run_past(arguments(tables, "--at", "2025-01-01T00:00"), client, calibration)


def test_live_needs_its_plant(client: LocalClient, calibration: Calibration) -> None:
    with pytest.raises(ConfigurationError, match="--mqtt: expected --plant and --state"):
        run_live(arguments("--mqtt", "mqtt://host/plant"), client, calibration)


def test_bad_words_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert trimoe(["maintenance", "forecast", "nowhere", "--model", "nowhere"]) == 2
    with pytest.raises(SystemExit):
        arguments("x", "--at", "2024-01-10T01:30")
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("trimoe")
