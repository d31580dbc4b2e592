"""The downtime ledger, by hours added up by hand."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from apps.console.ledger import read_ledger
from apps.maintenance.ledger import (
    Conduct,
    CostModel,
    conduct,
    hours_by_machine,
    ledger,
    saved_interval,
    write_ledger,
)
from apps.maintenance.protocol import Events, Rows

COSTS = CostModel(wait_hours=24, repair_hours=8, planned_hours=3, inspection_hours=1)
PERIOD = (datetime(2024, 1, 1), datetime(2024, 6, 1))


def test_notice_shortens_the_wait_and_long_notice_makes_the_stop_planned() -> None:
    seen = Conduct(np.array([0, 10, 24, 40]), np.array([0, 0, 1, 1]), np.array([0, 5]))
    planned, unplanned = hours_by_machine(seen, COSTS)
    assert unplanned.tolist() == [32.0 + 22.0, 0.0]
    assert planned.tolist() == [0.0, 3.0 + 3.0 + 5.0]


def test_alarms_become_notice_and_false_episodes_of_their_machine() -> None:
    rows = Rows(np.array([0, 0, 0, 1, 1]), np.array([3, 6, 60, 3, 30]))
    alarm = np.array([True, True, False, True, True])
    truth = np.array([1, 1, 0, 0, 0])
    found = conduct(rows, alarm, truth, Events(np.array([0]), np.array([30])), 48, 2)
    assert found.lead.tolist() == [27]
    assert found.false_episodes.tolist() == [0, 2]


def test_a_replay_gives_the_same_ledger_and_the_dashboard_reads_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    machine = rng.integers(0, 20, 60)
    warned = Conduct(rng.integers(0, 48, 60), machine, rng.integers(0, 3, 20))
    blind = Conduct(np.zeros(60, np.int64), machine, np.zeros(20, np.int64))
    found = [ledger(warned, blind, COSTS, PERIOD, "no warning") for _ in range(2)]
    assert found[0] == found[1]
    read = read_ledger(write_ledger(found[0], tmp_path))
    assert read is not None
    assert read["share"] == found[0]["saving"]["share"]
    low, high = read["interval"]
    assert low < read["share"] < high


def test_the_interval_of_a_sure_saving_is_a_point() -> None:
    hours = np.arange(1.0, 11.0)
    assert saved_interval(0.25 * hours, hours) == pytest.approx((0.75, 0.75))


def test_costs_below_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="wait_hours: expected 0 or more"):
        CostModel(wait_hours=-1.0)
