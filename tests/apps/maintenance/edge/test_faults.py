"""Kills, clocks, full disks and long silence: the box serves from a good slot, and ends."""

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from apps.maintenance.edge.slots import Slots
from apps.maintenance.edge.sources import Window
from apps.maintenance.edge.uplink import Uplink
from apps.maintenance.sync.boxes import read_messages
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.publishing import publish_bundle
from benchmarks.edge_kill import dawdle, kill_randomly
from benchmarks.edge_models import FEATURES, make_bundle
from benchmarks.edge_rig import ONE, TWO, Box, FileServer, SignedFolder, set_up_box, sync_server

ROOT = Path(__file__).parents[4]
NUM_KILLS = 30


@pytest.mark.clock
def test_kills_at_random_points(box: Box, signed: SignedFolder, server: FileServer) -> None:
    """SIGKILL in download, patch, switch and watch: a whole slot at each start, nothing lost."""
    box.close()
    with server.answering(dawdle):
        report = kill_randomly(box.state, signed, server.url, num_kills=NUM_KILLS, seed=5)
    assert report.kills == NUM_KILLS
    assert 0 < report.unconfirmed < NUM_KILLS  # kills met both a watch and no watch
    assert (report.broken, report.missing, report.unordered) == (0, 0, 0)
    assert report.exit_code == 0
    assert Slots(box.state).pointer.is_confirmed


def test_a_restart_without_a_network(box: Box, server: FileServer) -> None:
    box.feed(3)
    box.agent.forecast_once()
    num_waiting = box.agent.outbox.num_waiting
    box.close()
    server.shutdown()
    server.server_close()
    box.open()
    assert box.take(TWO) is Outcome.UNREACHABLE
    box.feed(3)
    assert box.agent.forecast_once() == 3
    assert box.agent.outbox.num_waiting > num_waiting + 3  # and what waited before still does
    assert box.slots.pointer.version == 1


@pytest.mark.parametrize("days", [365, -365])
def test_a_clock_that_jumps_by_a_year(box: Box, signed: SignedFolder, days: int) -> None:
    """Forward it stops updates and says so, backward it does not; neither outlasts the jump."""
    offer = publish_bundle(signed.repository, make_bundle(2))
    box.calendar.ahead = timedelta(days=days)
    outcome = box.take(TWO)
    box.feed(2)
    assert box.agent.forecast_once() == 2
    if days > 0:
        assert outcome in {Outcome.METADATA_EXPIRED, Outcome.METADATA_FROZEN}
        assert "is it right?" in box.agent.events.tail(1)[0]["detail"]
        assert box.slots.pointer.version == 1
        box.calendar.ahead = timedelta()
        outcome = box.take(TWO)
    assert outcome is Outcome.SWITCHED
    box.calendar.ahead = -box.calendar.ahead  # in the middle of the watch, which does not care
    box.confirm()
    assert (box.slots.pointer.digest, box.slots.pointer.is_confirmed) == (offer.digest, True)


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from apps.maintenance.edge.slots import Slots
from benchmarks.edge_rig import TWO, Box
box = Box(Path(sys.argv[1]), sys.argv[2])
box.feed(3)
before = box.agent.forecast_once()
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, unlimited[1]))  # no file may grow beyond 1 kB
refused = box.take(TWO)
box.feed(3)
during = box.agent.forecast_once()
serving = box.agent.serving.forecaster.info.version
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
after = box.agent.forecast_once()
switched = box.take(TWO)
print(json.dumps([before, refused, during, serving, after, switched]))
"""


@pytest.mark.slow
def test_a_full_disk(box: Box, signed: SignedFolder, server: FileServer) -> None:
    """No update, no forecast is lost, and both go on when there is room."""
    publish_bundle(signed.repository, make_bundle(2))
    box.close()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(box.state), server.url],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert json.loads(done.stdout) == [3, "disk_full", 0, 1, 3, "switched"]


@pytest.mark.clock
def test_ten_days_offline_and_a_drain(box: Box, tmp_path: Path) -> None:
    """100 machines, a window an hour each, a restart on the way: all there, in order."""
    num_hours, num_machines = 240, 100
    values = dict.fromkeys(FEATURES, 0.1)
    for hour in range(num_hours):
        if hour == 100:
            box.close()
            box.open()
        box.memory.add(
            [Window(f"m{idx:03d}", f"{hour:04d}", values) for idx in range(num_machines)]
        )
        while box.agent.forecast_once():
            pass
    num_waiting = box.agent.outbox.num_waiting
    assert num_waiting >= num_hours * num_machines
    full_bytes = box.agent.outbox.disk_bytes
    with Control(tmp_path / "fleet") as control, sync_server(control, tmp_path) as url:
        assert Uplink(url, "box").drain(box.agent.outbox) == num_waiting
        found = read_messages(control.database, "box", limit=10**6)
    assert box.agent.outbox.num_waiting == 0
    assert box.agent.outbox.evicted == {}
    assert box.agent.outbox.disk_bytes < full_bytes / 20
    forecasts = [(body["time"], body["machine"]) for _, body in found if body["kind"] == "forecast"]
    expected = [(f"{h:04d}", f"m{m:03d}") for h in range(num_hours) for m in range(num_machines)]
    assert forecasts == expected
    assert [seq for seq, _ in found] == sorted(seq for seq, _ in found)


def test_a_repeated_upload_is_kept_once(box: Box, tmp_path: Path) -> None:
    """The answer got lost, so the box sends again."""
    box.feed(3)
    box.agent.forecast_once()
    waiting = list(box.agent.outbox.head())
    with Control(tmp_path / "fleet") as control, sync_server(control, tmp_path) as url:
        uplink = Uplink(url, "box")
        uplink.drain(box.agent.outbox)
        num = len(read_messages(control.database, "box"))
        body = b",".join(b'{"seq":%d,"body":%s}' % (each.seq, each.body) for each in waiting)
        answer = uplink.post("messages", b'{"messages":[%s]}' % body)
        assert answer == {"acknowledged": waiting[-1].seq}
        assert len(read_messages(control.database, "box")) == num == len(waiting)


def test_a_box_without_any_model_says_so_and_loses_nothing(
    signed: SignedFolder, server: FileServer, tmp_path: Path
) -> None:
    set_up_box(tmp_path / "bare", signed.root)
    bare = Box(tmp_path / "bare", server.url)
    bare.feed(3)
    assert bare.agent.forecast_once() == 0
    assert bare.agent.status()["version"] == 0
    assert bare.take(ONE) is Outcome.SWITCHED
    assert bare.agent.forecast_once() == 3
    bare.close()
