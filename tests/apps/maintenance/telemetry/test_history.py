"""The history: whole after any crash, each message once, hours out of samples."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from apps.maintenance.telemetry.history import TELEMETRY_TABLE, History, parts
from apps.maintenance.telemetry.messages import Message
from apps.maintenance.telemetry.plant import Plant
from apps.maintenance.telemetry.records import read_history
from cluster.errors import ConfigurationError

START = datetime(2026, 1, 1)


def seconds(hours: float) -> float:
    return (START + timedelta(hours=hours)).replace(tzinfo=UTC).timestamp()


def sample(hour: float, value: float | None, machine: str = "M1") -> Message:
    return Message("telemetry", machine, seconds(hour), {"values": {"vibration": value}})


def event(hour: float, what: str, name: str) -> Message:
    return Message("event", "M1", seconds(hour), {"what": what, "name": name})


def test_an_hour_is_the_mean_of_the_samples_up_to_it(tmp_path: Path, plant: Plant) -> None:
    history = History(tmp_path, plant)
    history.append([sample(h / 6, h) for h in range(1, 13)])  # every ten minutes, hours 1 and 2
    history.append([event(0.5, "error", "E2"), event(1.0, "failure", "drive")])
    history.append([Message("machine", "M1", seconds(0), {"model": 3, "age_years": 7.0})])
    history.seal()
    fleet = read_history(tmp_path)
    assert fleet.start == START + timedelta(hours=1)
    assert fleet.telemetry[0, :, 0].tolist() == [3.5, 9.5]
    assert np.isnan(fleet.telemetry[0, :, 1]).all()  # a sensor that never spoke
    assert (fleet.errors.hour.tolist(), fleet.errors.kind.tolist()) == ([0], [1])
    assert fleet.failures.hour.tolist() == [0]
    assert (fleet.models.tolist(), fleet.age_years.tolist()) == ([3], [7.0])


def test_half_an_hour_of_samples_is_an_hour_and_less_is_a_gap(tmp_path: Path, plant: Plant) -> None:
    history = History(tmp_path, plant)
    history.append([sample(1 + h / 6, 1.0) for h in (1, 2, 3)])
    history.append([sample(2 + h / 6, 1.0) for h in (1, 2)] + [sample(2.5, None)])
    history.append([sample(3 + h / 6, 0.0) for h in range(1, 7)])
    history.seal()
    found = read_history(tmp_path).telemetry[0, :, 0]
    assert found[[0, 2]].tolist() == [1.0, 0.0]
    assert np.isnan(found[1])


def test_what_comes_later_changes_no_hour_before_it(tmp_path: Path, plant: Plant) -> None:
    history = History(tmp_path, plant)
    history.append([sample(h / 6, 1.0) for h in range(1, 13)] + [event(1.5, "error", "E1")])
    history.seal()
    fleet = read_history(tmp_path, START + timedelta(hours=1))
    assert fleet.num_hours == 1
    assert fleet.errors.hour.size == 0


def test_a_message_that_the_broker_repeats_counts_once(tmp_path: Path, plant: Plant) -> None:
    messages = [sample(h / 6, float(h)) for h in range(1, 7)]

    def begun_again() -> History:
        history = History(tmp_path, plant)
        history.append([*messages, event(0.5, "error", "E1")])
        history.seal()
        return history

    begun_again()
    history = begun_again()
    assert len(parts(tmp_path, TELEMETRY_TABLE)) == 2
    history.append([sample(1 / 6, 99.0)])  # another content for a moment that is known
    history.seal()
    fleet = read_history(tmp_path)
    assert fleet.telemetry[0, :, 0].tolist() == [3.5]
    assert fleet.errors.hour.size == 1


def test_days_are_joined_and_read_the_same(tmp_path: Path, plant: Plant) -> None:
    history = History(tmp_path, plant)
    for hour in range(48):
        history.append([sample(hour + h / 6, float(hour)) for h in range(1, 7)])
        history.seal()
    before = read_history(tmp_path).telemetry
    old = parts(tmp_path, TELEMETRY_TABLE)
    history.compact(START + timedelta(days=1, hours=3))
    joined = parts(tmp_path, TELEMETRY_TABLE)
    assert len(joined) < len(old)
    np.testing.assert_array_equal(before, read_history(tmp_path).telemetry)


def test_a_crash_within_joining_doubles_nothing(tmp_path: Path, plant: Plant) -> None:
    history = History(tmp_path, plant)
    for hour in range(3):
        history.append([sample(hour + h / 6, float(hour)) for h in range(1, 7)])
        history.seal()
    day = tmp_path / "telemetry" / "day=2026-01-01"
    kept = {path: path.read_bytes() for path in day.glob("*.parquet")}
    history.compact(START + timedelta(days=1))
    for path, data in kept.items():  # as if it had been killed before it removed them
        path.write_bytes(data)
    assert len(parts(tmp_path, TELEMETRY_TABLE)) == 1
    history.compact(START + timedelta(days=1))
    assert read_history(tmp_path).telemetry[0, :, 0].tolist() == [0.0, 1.0, 2.0]


def test_another_plant_and_an_empty_history_are_refused(tmp_path: Path, plant: Plant) -> None:
    History(tmp_path, plant)
    with pytest.raises(ConfigurationError, match="expected telemetry, found none yet"):
        read_history(tmp_path)
    other = Plant(60, plant.sensors, plant.errors, plant.components)
    with pytest.raises(ConfigurationError, match="the plant it was begun with"):
        History(tmp_path, other)


WRITER = """
import sys
from pathlib import Path
from apps.maintenance.telemetry.history import History
from apps.maintenance.telemetry.messages import Message
from apps.maintenance.telemetry.plant import FILE, Plant
folder, first = Path(sys.argv[1]), int(sys.argv[2])
history = History(folder, Plant.read(folder / FILE))
for n in range(first, 100_000):
    moment = 1767225600.0 + 600 * n
    history.append([Message("telemetry", "M1", moment, {"values": {"vibration": float(n)}})])
    print(n, flush=True)  # the acknowledgement
    if n % 5 == 0:
        history.seal()
"""


@pytest.mark.slow
def test_kills_lose_nothing_acknowledged_and_double_nothing(tmp_path: Path, plant: Plant) -> None:
    History(tmp_path, plant)
    rng, acknowledged = np.random.default_rng(0), 1
    for _ in range(8):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(acknowledged)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(int(rng.integers(1, 60))):
                acknowledged = int(writer.stdout.readline())
            os.kill(writer.pid, signal.SIGKILL)
            for line in writer.stdout:
                acknowledged = int(line)
        # The broker repeats the last one, and what was not acknowledged.
    history = History(tmp_path, plant)
    history.seal()
    assert history.num_damaged == 0
    found = read_history(tmp_path).telemetry[0, :, 0]
    hours = acknowledged // 6
    wanted = [np.mean(range(6 * h + 1, 6 * h + 7)) for h in range(hours)]
    assert hours > 10
    assert found[:hours].tolist() == wanted
