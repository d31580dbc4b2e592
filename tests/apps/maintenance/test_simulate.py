"""The generator and the tables it is kept in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from apps.maintenance.fleet import Fleet
from apps.maintenance.simulate import COMPONENTS, ERRORS, SENSORS, SimulationConfig, simulate
from apps.maintenance.tables import read_fleet, write_fleet
from apps.maintenance.telemetry.plant import FILE, Plant

CONFIG = SimulationConfig(num_machines=20, num_days=180, seed=3)


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return simulate(CONFIG)


def test_the_same_seed_gives_the_same_fleet(fleet: Fleet) -> None:
    again, other = simulate(CONFIG), simulate(replace(CONFIG, seed=4))
    np.testing.assert_array_equal(fleet.telemetry, again.telemetry)
    np.testing.assert_array_equal(fleet.failures.hour, again.failures.hour)
    assert not np.array_equal(fleet.telemetry, other.telemetry, equal_nan=True)


def test_every_failure_is_answered_by_a_replacement_in_its_hour(fleet: Fleet) -> None:
    replaced = set(_triples(fleet, "maintenance"))
    assert fleet.failures.hour.size > 50
    assert set(_triples(fleet, "failures")) <= replaced
    assert len(replaced) > 2 * fleet.failures.hour.size  # most replacements are planned


def test_the_sensor_of_a_component_drifts_before_most_of_its_failures(fleet: Fleet) -> None:
    for component in range(len(COMPONENTS)):
        usual = np.nanmedian(fleet.telemetry[:, :, component])
        spread = np.nanstd(fleet.telemetry[:, :, component])
        failed = fleet.failures.kind == component
        late = [
            np.nanmean(fleet.telemetry[m, max(h - 12, 0) : h, component])
            for m, h in zip(
                fleet.failures.machine[failed], fleet.failures.hour[failed], strict=True
            )
            if h > 12
        ]
        moved = np.abs(np.array(late) - usual) > spread
        assert 0.5 < np.nanmean(moved) < 1.0, SENSORS[component]  # a shock gives no notice


def test_tables_bring_the_fleet_back(fleet: Fleet, tmp_path: Path) -> None:
    write_fleet(fleet, tmp_path)
    back = read_fleet(tmp_path)
    np.testing.assert_array_equal(back.telemetry, fleet.telemetry)
    for name in ("errors", "failures", "maintenance"):
        assert _triples(back, name) == _triples(fleet, name)
    assert tuple(back.components) == COMPONENTS
    assert back.start == fleet.start


def test_an_unknown_machine_or_a_time_off_the_hour_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    write_fleet(fleet, tmp_path)
    path = tmp_path / "errors.parquet"
    table = pd.read_parquet(path)
    table.assign(machine="M999").to_parquet(path)
    with pytest.raises(ValueError, match="errors: expected machines of the list"):
        read_fleet(tmp_path)
    table.assign(time=table["time"] + pd.Timedelta(minutes=1)).to_parquet(path)
    with pytest.raises(ValueError, match="times on whole hours"):
        read_fleet(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"errors\.parquet or errors\.csv"):
        read_fleet(tmp_path)


def test_csv_tables_are_read_as_parquet_is(tmp_path: Path) -> None:
    fleet = simulate(SimulationConfig(num_machines=4, num_days=90))
    write_fleet(fleet, tmp_path)
    for path in list(tmp_path.glob("*.parquet")):
        pd.read_parquet(path).to_csv(path.with_suffix(".csv"), index=False)
        path.unlink()
    back = read_fleet(tmp_path)
    np.testing.assert_allclose(back.telemetry, fleet.telemetry, rtol=1e-6)
    assert _triples(back, "failures") == _triples(fleet, "failures")


def test_finer_samples_become_hours_and_thin_hours_gaps(tmp_path: Path) -> None:
    small = simulate(SimulationConfig(num_machines=1, num_days=2))
    write_fleet(small, tmp_path)
    Plant(1200, dict.fromkeys(SENSORS, "1"), ERRORS, COMPONENTS).write(tmp_path / FILE)
    start = pd.Timestamp("2024-01-01")
    minutes = [20, 40, 60, 80, 140, 160, 180]  # hour 2 has one sample of three
    table = pd.DataFrame({"time": [start + pd.Timedelta(minutes=m) for m in minutes]})
    table = table.assign(machine="M000", **{name: np.arange(7.0) for name in SENSORS})
    table.loc[6, "current"] = np.nan
    table.to_parquet(tmp_path / "telemetry.parquet")
    back = read_fleet(tmp_path)
    assert back.start == start + pd.Timedelta(hours=1)
    assert back.telemetry[0, 0].tolist() == [1.0] * 4
    assert np.isnan(back.telemetry[0, 1]).all()
    assert back.telemetry[0, 2].tolist() == [5.0, 4.5, 5.0, 5.0]


def test_two_rows_of_one_hour_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    write_fleet(fleet, tmp_path)
    path = tmp_path / "telemetry.parquet"
    table = pd.read_parquet(path)
    pd.concat([table, table.head(1)]).to_parquet(path)
    with pytest.raises(ValueError, match="one row per machine and hour"):
        read_fleet(tmp_path)


def _triples(fleet: Fleet, name: str) -> list[tuple[int, int, int]]:
    records = getattr(fleet, name)
    return list(
        zip(records.machine.tolist(), records.hour.tolist(), records.kind.tolist(), strict=True)
    )
