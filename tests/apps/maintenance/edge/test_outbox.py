"""The durable queue: order, cap, eviction, reclaim, kill and a disk without room."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apps.maintenance.edge.outbox import PAGE_BYTES, Outbox, Priority
from cluster.errors import ConfigurationError, UnavailableError

ROOT = Path(__file__).parents[4]
CAP_BYTES = 512 * 1024


def texts(outbox: Outbox) -> list[str]:
    return [each.body.decode() for each in outbox.head(10**6, 10**9)]


def test_messages_leave_in_the_order_they_came_and_survive_a_reopening(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db", CAP_BYTES) as outbox:
        outbox.put([(Priority.FORECAST, b"1"), (Priority.ALERT, b"2"), (Priority.EVENT, b"3")])
    with Outbox(tmp_path / "o.db", CAP_BYTES) as outbox:
        assert texts(outbox) == ["1", "2", "3"]
        outbox.acknowledge(outbox.head(2)[-1].seq)
        assert texts(outbox) == ["3"]


def test_a_number_is_never_used_twice(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db", CAP_BYTES) as outbox:
        outbox.put([(Priority.EVENT, b"x")])
        first = outbox.head()[0].seq
        outbox.acknowledge(first)
    with Outbox(tmp_path / "o.db", CAP_BYTES) as outbox:
        outbox.put([(Priority.EVENT, b"y")])
        assert outbox.head()[0].seq == first + 1


def test_the_cap_holds_and_the_oldest_of_the_lowest_priority_go_first(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db", CAP_BYTES) as outbox:
        most_bytes, num = 0, 3000
        for first in range(0, num, 20):
            outbox.put(
                [
                    (Priority.FORECAST if idx % 50 else Priority.ALERT, b"%06d" % idx + b"." * 400)
                    for idx in range(first, first + 20)
                ]
            )
            most_bytes = max(most_bytes, outbox.disk_bytes)
        assert most_bytes <= CAP_BYTES
        kept = [(each.priority, int(each.body[:6])) for each in outbox.head(10**6, 10**9)]
        alerts = [idx for priority, idx in kept if priority is Priority.ALERT]
        forecasts = [idx for priority, idx in kept if priority is Priority.FORECAST]
        assert alerts == list(range(0, num, 50))  # nothing above the lowest was given up
        assert forecasts == [i for i in range(forecasts[0], num) if i % 50]  # only the oldest
        assert outbox.evicted == {Priority.FORECAST: num - len(kept)}
        assert len(kept) * 406 > CAP_BYTES / 3  # and the cap is used


def test_more_alerts_than_fit_give_up_the_oldest_alerts(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db", CAP_BYTES) as outbox:
        outbox.put([(Priority.ALERT, b"%06d" % idx + b"." * 400) for idx in range(3000)])
        kept = [int(each.body[:6]) for each in outbox.head(10**6, 10**9)]
        assert kept == list(range(3000 - len(kept), 3000))
        assert outbox.evicted == {Priority.ALERT: 3000 - len(kept)}


def test_a_message_larger_than_the_cap_is_counted_and_harms_nothing_later(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db", CAP_BYTES) as outbox:
        with pytest.raises(UnavailableError, match="outbox"):
            outbox.put([(Priority.EVENT, b"." * CAP_BYTES)])
        outbox.put([(Priority.EVENT, b"small")])
        assert texts(outbox) == ["small"]


def test_a_drain_gives_the_room_back(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db", CAP_BYTES) as outbox:
        outbox.put([(Priority.FORECAST, b"." * 1000)] * 200)
        assert outbox.disk_bytes > 200_000
        while found := outbox.head(16):
            outbox.acknowledge(found[-1].seq)
        assert outbox.disk_bytes <= 16 * PAGE_BYTES


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    path.write_bytes(b"not a database at all" * 1000)
    with Outbox(path, CAP_BYTES) as outbox:
        assert outbox.was_damaged
        outbox.put([(Priority.EVENT, b"on")])
    with Outbox(path, CAP_BYTES) as outbox:
        assert not outbox.was_damaged
        assert texts(outbox) == ["on"]
    assert path.with_name("o.db.damaged").exists()


def test_numbers_go_on_behind_a_damaged_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "o.db", []
    for _ in range(3):
        with Outbox(path, CAP_BYTES) as outbox:
            outbox.put([(Priority.EVENT, b"on")] * 3)
            seen += [message.seq for message in outbox.head()]
        path.write_bytes(b"not a database at all" * 1000)
    assert len(set(seen)) == 9
    assert seen == sorted(seen)


def test_a_cap_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cap"):
        Outbox(tmp_path / "o.db", 1000)


WRITER = """
import sys
from pathlib import Path
from apps.maintenance.edge.outbox import Outbox, Priority
outbox = Outbox(Path(sys.argv[1]), 2**26)
for idx in range(10**9):
    outbox.put([(Priority.FORECAST, b"%d" % idx)])
    print(idx, flush=True)
"""


def test_what_was_put_before_a_kill_is_there_in_order(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(5)]
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        said += process.stdout.readlines()
    last = int([line for line in said if line.endswith(b"\n")][-1])
    with Outbox(path, 2**26) as outbox:
        kept = [int(each.body) for each in outbox.head(10**6)]
    assert kept[: last + 1] == list(range(last + 1))
    assert len(kept) <= last + 2  # one more may have been written and not yet said


FULL_DISK = """
import resource, sys
from pathlib import Path
from apps.maintenance.edge.outbox import Outbox, Priority
from cluster.errors import UnavailableError
outbox = Outbox(Path(sys.argv[1]), 2**26)
outbox.put([(Priority.ALERT, b"kept")])
resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, resource.RLIM_INFINITY))
num_refused = 0
for _ in range(40):
    try:
        outbox.put([(Priority.FORECAST, b"." * 20_000)])
    except UnavailableError:
        num_refused += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
outbox.put([(Priority.ALERT, b"later")])
bodies = [each.body for each in outbox.head(10**6, 10**9)]
print(num_refused, bodies[0] == b"kept", bodies[-1] == b"later", len(bodies) + num_refused)
"""


def test_a_disk_without_room_loses_nothing_that_was_taken(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "o.db")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    num_refused, *rest = done.stdout.split()
    assert int(num_refused) > 0
    assert rest == ["True", "True", "42"]
