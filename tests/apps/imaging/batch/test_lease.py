"""Who is alive, by a lock and a beat."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apps.imaging.batch.lease import Lease, LeaseWatch

HOLDER = """
import sys, time
from pathlib import Path
from apps.imaging.batch.lease import Lease
with Lease(Path(sys.argv[1]), "x", float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_elsewhere(folder: Path, lease_s: float) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lease ``x``; killed at the end."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(lease_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_a_lease_is_held_while_its_block_runs(tmp_path: Path) -> None:
    watch = LeaseWatch(tmp_path, 30.0)
    assert not watch.is_held("x")
    with Lease(tmp_path, "x", 30.0):
        assert watch.is_held("x")
        assert watch.is_held("x")
    assert not watch.is_held("x")
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_used_once(tmp_path: Path) -> None:
    (tmp_path / "x.new").touch()
    with pytest.raises(FileExistsError), Lease(tmp_path, "x", 30.0):
        pass


def test_a_killed_process_is_known_to_be_dead_at_once(tmp_path: Path) -> None:
    watch = LeaseWatch(tmp_path, 30.0)
    with held_elsewhere(tmp_path, 30.0) as holder:
        assert watch.is_held("x")
        holder.kill()
        holder.wait()
        assert not watch.is_held("x")
    assert (tmp_path / "x").exists()
    watch.sweep()
    assert not (tmp_path / "x").exists()


@pytest.mark.clock
def test_a_stopped_process_is_presumed_dead_after_its_lease_and_alive_when_it_goes_on(
    tmp_path: Path,
) -> None:
    watch = LeaseWatch(tmp_path, 0.5)
    with held_elsewhere(tmp_path, 0.5) as holder:
        for _ in range(12):  # twice its lease
            assert watch.is_held("x")
            time.sleep(0.1)
        holder.send_signal(signal.SIGSTOP)
        assert watch.is_held("x")
        time.sleep(1.0)
        assert not watch.is_held("x")
        watch.sweep()
        holder.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        assert watch.is_held("x")
