"""The ledger of a record and its forecasts, by hours added up by hand."""

import json
from argparse import Namespace
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from apps.console.ledger import read_ledger
from apps.maintenance.fleet import Fleet, Records
from apps.maintenance.forecasts.records import TABLE
from apps.maintenance.ledger import CostModel, digest
from apps.maintenance.replay import main, read_forecasts, replay
from apps.maintenance.simulate import SimulationConfig, simulate
from apps.maintenance.tables import write_fleet
from cluster.errors import ConfigurationError

COSTS = CostModel()


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    """Two machines; failures at hours 10, before any warning counts, 120 and 150."""
    made = simulate(SimulationConfig(num_machines=2, num_days=10))
    failures = Records.sorted(np.array([0, 0, 1]), np.array([10, 120, 150]), np.array([1, 2, 3]))
    return replace(made, failures=failures)


def forecasts(fleet: Fleet) -> pd.DataFrame:
    """Machine 0 is warned of 36 and 3 hours ahead, 1 of 6 hours ahead; and once for nothing."""
    rows = []
    for machine, early, late in ((0, {84}, {117}), (1, {144, 201}, set())):
        for hour in range(3, 240, 3):
            moment = fleet.start + timedelta(hours=hour)
            row = {"time": moment, "machine": fleet.machines[machine]}
            row["decision_48h"] = "pump" if hour in early else None
            row["decision_4h"] = "pump" if hour in late else None
            rows.append(row)
    return pd.DataFrame(rows).sample(frac=1.0, random_state=0)


def test_hours_of_both_policies(fleet: Fleet) -> None:
    found = replay(fleet, forecasts(fleet), COSTS)
    assert found["failures"] == 2
    assert found["policy"]["unplanned_hours"] == 24 - 6 + 8
    assert found["policy"]["planned_hours"] == 3 + 1
    assert found["baseline"]["unplanned_hours"] == (24 - 3 + 8) + (24 + 8)
    assert [(e["lead_hours"], e["is_planned"]) for e in found["entries"]] == [
        (36, True),
        (6, False),
    ]
    assert found["saving"]["share"] == pytest.approx(1 - 26 / 61)


def test_a_replay_is_the_same_and_another_cost_is_another(fleet: Fleet) -> None:
    found = [replay(fleet, forecasts(fleet), COSTS) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["digest"] == digest(found[0])
    other = replay(fleet, forecasts(fleet), CostModel(wait_hours=12))
    assert other["digest"] != found[0]["digest"]


def test_the_command_writes_what_the_dashboard_reads(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fleet(fleet, tmp_path / "tables")
    (tmp_path / "out").mkdir()
    forecasts(fleet).to_parquet(tmp_path / "out" / TABLE)
    args = Namespace(
        data=tmp_path / "tables",
        forecasts=tmp_path / "out",
        fleet=tmp_path / "fleet",
        json=tmp_path / "ledger.json",
        wait_hours=24.0,
        repair_hours=8.0,
        planned_hours=3.0,
        inspection_hours=1.0,
    )
    assert main(args) == 0
    found = json.loads((tmp_path / "ledger.json").read_text())
    assert f"digest {found['digest']}" in capsys.readouterr().out
    assert digest(found) == found["digest"]
    read = read_ledger(tmp_path / "fleet" / "ledger.json")
    assert read is not None
    assert read["policy"]["unplanned_hours"] == 26
    args.wait_hours = -1.0
    with pytest.raises(ConfigurationError, match="wait_hours: expected 0 or more"):
        main(args)


def test_forecasts_of_another_fleet_and_too_few_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    table = forecasts(fleet)
    with pytest.raises(ConfigurationError, match="expected machines of the fleet, got 'X'"):
        replay(fleet, table.assign(machine="X"), COSTS)
    with pytest.raises(ConfigurationError, match="expected failures 48 hours after"):
        replay(fleet, table[table["time"] < fleet.start + timedelta(hours=60)], COSTS)
    with pytest.raises(ConfigurationError, match="or a finished evaluation, found neither"):
        read_forecasts(tmp_path, fleet)
    table[["time", "machine"]].to_parquet(tmp_path / TABLE)
    with pytest.raises(ConfigurationError, match="missing"):
        read_forecasts(tmp_path, fleet)
