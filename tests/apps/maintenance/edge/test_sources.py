"""Where windows come from: a file that grows, without a line lost, repeated or made up."""

from pathlib import Path

import pytest

from apps.maintenance.edge.sources import CsvTail
from benchmarks.edge_models import FEATURES
from benchmarks.edge_rig import Box
from cluster.errors import ConfigurationError

HEADER = "machine,time,wear,load\n"


def test_whole_lines_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    tail = CsvTail(path, tmp_path / "place")
    assert tail.poll(10) == []
    path.write_text(HEADER + "m1,1,0.5,2\nm2,1,0.")
    found = tail.poll(10)
    assert [(each.machine, each.time, dict(each.features)) for each in found] == [
        ("m1", "1", {"wear": 0.5, "load": 2.0})
    ]
    tail.commit()
    with path.open("a") as file:
        file.write("25,3\n")
    assert [each.features["wear"] for each in tail.poll(10)] == [0.25]


def test_what_was_not_committed_comes_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "".join(f"m,{idx},0,0\n" for idx in range(5)))
    tail = CsvTail(path, tmp_path / "place")
    tail.poll(2)
    tail.commit()
    assert [each.time for each in tail.poll(2)] == ["2", "3"]
    again = CsvTail(path, tmp_path / "place")
    assert [each.time for each in again.poll(10)] == ["2", "3", "4"]


def test_a_file_that_was_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "m,1,0,0\nm,2,0,0\n")
    tail = CsvTail(path, tmp_path / "place")
    tail.poll(10)
    tail.commit()
    (tmp_path / "new.csv").write_text(HEADER + "m,3,0,0\n")
    (tmp_path / "new.csv").replace(path)
    assert [each.time for each in tail.poll(10)] == ["3"]


def test_a_value_that_is_not_there_is_absent_and_never_zero(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "m,1,,1\nm,2,nan,1\nm,3,broken,1\nm,4,inf,1\nm,5,1\n")
    found = CsvTail(path, tmp_path / "place").poll(10)
    assert ["wear" in each.features for each in found] == [False, False, False, False, True]
    assert "load" not in found[4].features


def test_a_file_without_machine_and_time_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigurationError, match="machine and time"):
        CsvTail(path, tmp_path / "place").poll(1)


def test_the_agent_leaves_incomplete_windows_out_and_counts_them(box: Box) -> None:
    path = box.state / "t.csv"
    whole = ",".join(["0.1"] * len(FEATURES))
    lacking = ",".join(["0.1"] * (len(FEATURES) - 1)) + ","
    header = "machine,time," + ",".join(FEATURES)
    path.write_text(f"{header}\nm1,1,{whole}\nm2,1,{lacking}\nm3,1,{whole}\n")
    box.close()
    box.source = CsvTail(path, box.state / "place.json")
    box.open()
    assert box.agent.forecast_once() == 3
    assert (box.agent.counts.windows, box.agent.counts.incomplete) == (2, 1)
    assert "windows_incomplete" in box.events


def test_an_alert_is_told_when_it_begins(box: Box) -> None:
    for wear in (0.2, 0.9, 0.95, 0.2, 0.9):
        box.feed(1, wear=wear)
        box.agent.forecast_once()
    alerts = [each for each in box.agent.outbox.head(10**6) if b'"alert"' in each.body]
    assert len(alerts) == 2 * 2  # begins twice, for two components
