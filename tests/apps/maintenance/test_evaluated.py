"""A finished evaluation as a table of decisions."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from apps.maintenance.azure import NUM_HOURS
from apps.maintenance.evaluated import evaluated_table
from apps.maintenance.fleet import Fleet, Records
from apps.maintenance.ledger import CostModel
from apps.maintenance.replay import replay
from apps.maintenance.simulate import SimulationConfig, simulate
from cluster.errors import ConfigurationError

FIRST_ROW, ROWS = 5085, 1226  # of a machine: hours after the test's start, before its end


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    """Two machines through the year of the sample; one fails at hour 6000."""
    made = simulate(SimulationConfig(num_machines=2, num_days=1))
    return replace(
        made,
        start=datetime(2015, 1, 1, 6),
        num_hours=NUM_HOURS,
        telemetry=np.full((2, NUM_HOURS, 4), np.nan, np.float32),
        failures=Records(np.array([0]), np.array([6000]), np.array([2])),
    )


def write_run(folder: Path, num: int, alarm: int) -> None:
    logits = np.full((num, 4, 4), -8.0)
    logits[alarm, 2, 1] = 0.0  # hazard of the third bucket; .5 against caution 1 is undecided
    logits[alarm + 1, 2, 1] = 1.0
    both = logits.reshape(num, 16)
    tree = np.full_like(both, -8.0)  # a gate of 3 to 1 brings the mixture back to ``logits``
    sequence = tree + (both - tree) / 0.75
    np.savez(folder / "logs-ours-0.npz", tree_both=tree, sequence_both=sequence)
    caution, gate = np.array([1.0, 1.0, 0.9, 1.0]), np.full((4, 4), np.log(3.0))
    np.savez(folder / "logs-calibration.npz", caution=caution, gate=gate)


def test_decisions_follow_the_cautions_and_feed_the_ledger(fleet: Fleet, tmp_path: Path) -> None:
    alarm = (5970 - FIRST_ROW) // 3
    write_run(tmp_path, 2 * ROWS, alarm)
    table = evaluated_table(tmp_path, fleet)
    said = table[table["decision_48h"].notna()]
    assert said["decision_48h"].tolist() == [fleet.components[1]] * 2
    hours = [fleet.hour_of(moment.to_pydatetime()) for moment in said["time"]]
    assert hours == [5970, 5973]
    assert table["decision_24h"].isna().all()
    found = replay(fleet, table, CostModel())
    assert [each["lead_hours"] for each in found["entries"]] == [30]


def test_an_evaluation_of_another_record_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    write_run(tmp_path, 100, 5)
    with pytest.raises(ConfigurationError, match="expected answers on 2452 rows of logs, got 100"):
        evaluated_table(tmp_path, fleet)
