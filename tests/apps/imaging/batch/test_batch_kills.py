"""Batches in real processes that are killed, stopped and frozen at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apps.imaging.batch.claims import Kind
from apps.imaging.batch.journal import decode_lines
from apps.imaging.batch.manifest import read_manifest
from tests.apps.imaging.batch.small_batch import GIVEN_UP, ROOT, STOPPED, discover, make_input

pytestmark = pytest.mark.slow
PATIENCE_S = 60.0


def driver(folder: Path, out: Path, *options: str) -> "subprocess.Popen[str]":
    """Start a driver; its workers are its children."""
    command = [sys.executable, "-m", "tests.apps.imaging.batch.small_batch"]
    command += ["--input", str(folder), "--out", str(out), *options]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(running: "subprocess.Popen[str]") -> str:
    """Wait for a driver to end well."""
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, said
    return said


def until(condition: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the condition returns
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "waited for too long"
        time.sleep(0.01)
    return found


def events(out: Path) -> list[dict[str, Any]]:
    path = out / "batch" / "journal"
    records = decode_lines(path.read_bytes())[0] if path.exists() else []
    return [dict(record) for record in records[1:]]


def wait_for_events(out: Path, num: int) -> None:
    until(lambda: len(events(out)) >= num)


def num_results(out: Path) -> int:
    return sum(event["kind"] == Kind.RESULT for event in events(out))


def runner_of(folder: Path, case: dict[str, Any]) -> int:
    """The process that runs a case just now, 0 if none does."""
    path = folder.parent / "locks" / case["case_id"]
    return int((path.read_text() if path.exists() else "") or 0)


def cases_of(folder: Path) -> list[dict[str, Any]]:
    return [{"case_id": each.case_id, "source": each.label} for each in discover(folder).sources]


def assert_whole(folder: Path, out: Path) -> dict[str, Any]:
    """Every case once, outputs complete, no case run twice at a time; return the manifest."""
    manifest = dict(read_manifest(out / "manifest.json"))
    names = sorted(path.name for path in folder.glob("*.json"))
    assert [case["source"] for case in manifest["cases"]] == names
    assert manifest["complete"]
    of_case = Counter(event["case"] for event in events(out) if event["kind"] == Kind.RESULT)
    assert set(of_case.values()) <= {1}
    assert list((folder.parent / "doubled").iterdir()) == []
    present = {path.relative_to(out).as_posix() for path in (out / "cases").rglob("*.*")}
    listed = {name for name in manifest["files"] if name.startswith("cases/")}
    assert present == listed
    assert list((out / "batch" / "attempts").iterdir()) == []
    until(lambda: not list((out / "batch" / "leases").iterdir()))
    return manifest


def test_a_driver_killed_again_and_again_leaves_what_an_undisturbed_run_leaves(
    tmp_path: Path,
) -> None:
    chosen = random.Random(4)
    cases: list[dict[str, Any]] = [
        {"seconds": round(chosen.uniform(0.05, 0.5), 2)} for _ in range(30)
    ]
    cases[7]["how"] = "unreadable"
    folder = make_input(tmp_path / "in", cases)
    finish(driver(folder, tmp_path / "calm"))
    calm = assert_whole(folder, tmp_path / "calm")
    out, num_kills = tmp_path / "out", 6
    for number in range(num_kills):
        enough = len(events(out)) + chosen.randint(1, 12)
        running = driver(folder, out, "--resume")
        if number == 0:
            time.sleep(chosen.uniform(0.1, 0.8))  # while it starts
        else:
            wait_for_events(out, enough)
        if number % 2:
            os.killpg(running.pid, signal.SIGKILL)  # and its workers: the machine is gone
        else:
            running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL
    finish(driver(folder, out, "--resume"))
    manifest = assert_whole(folder, out)
    assert manifest["files"] == calm["files"]
    for case, before in zip(manifest["cases"], calm["cases"], strict=True):
        assert {**case, "attempts": 0} == {**before, "attempts": 0}
    kinds = Counter(event["kind"] for event in events(out))
    assert kinds[Kind.LOST] == kinds[Kind.FAILED] == 0
    assert kinds[Kind.ORPHANED] >= 1


def test_a_killed_worker_costs_its_case_one_attempt_and_the_others_nothing(
    tmp_path: Path,
) -> None:
    folder = make_input(tmp_path / "in", [{"seconds": 0.3}] * 8)
    out, victim = tmp_path / "out", cases_of(folder)[3]
    running = driver(folder, out, "--in-flight", "1")
    os.kill(until(lambda: runner_of(folder, victim)), signal.SIGKILL)
    finish(running)
    manifest = assert_whole(folder, out)
    attempts = {case["source"]: case["attempts"] for case in manifest["cases"]}
    assert attempts.pop(victim["source"]) == 2
    assert set(attempts.values()) == {1}
    assert {case["status"] for case in manifest["cases"]} == {"correct"}


def test_a_case_that_kills_its_worker_is_quarantined_and_holds_nobody_up(tmp_path: Path) -> None:
    """Two at once in each worker: the poison takes neighbours with it, but only once."""
    cases: list[dict[str, Any]] = [{"seconds": 0.1} for _ in range(8)]
    cases[2] = {"seconds": 0.05, "how": "poison"}
    folder, out = make_input(tmp_path / "in", cases), tmp_path / "out"
    finish(driver(folder, out, "--in-flight", "2"))
    manifest = assert_whole(folder, out)
    poison = manifest["cases"].pop(2)
    assert poison["status"] == "quarantined"
    assert [reason["code"] for reason in poison["reasons"]] == ["WORKER_LOST"]
    assert poison["attempts"] == 3
    assert {case["status"] for case in manifest["cases"]} == {"correct"}
    assert max(case["attempts"] for case in manifest["cases"]) <= 2
    order = [event["case"] for event in events(out) if event["kind"] == Kind.RESULT]
    assert order[-1] == poison["case_id"]


@pytest.mark.clock
def test_a_frozen_worker_is_fenced_off_when_it_wakes(tmp_path: Path) -> None:
    folder = make_input(tmp_path / "in", [{"seconds": 0.4}] * 4)
    out, victim = tmp_path / "out", cases_of(folder)[1]
    running = driver(folder, out, "--in-flight", "1", "--lease-s", "1")
    frozen = until(lambda: runner_of(folder, victim))
    os.kill(frozen, signal.SIGSTOP)
    (folder.parent / "locks" / victim["case_id"]).unlink()  # it will be out of the game
    try:
        until(lambda: any(event["kind"] == Kind.LOST for event in events(out)))
    finally:
        os.kill(frozen, signal.SIGCONT)
    finish(running)
    assert_whole(folder, out)
    own = [event for event in events(out) if event["case"] == victim["case_id"]]
    assert [event["kind"] for event in own] == [Kind.CLAIM, Kind.LOST, Kind.CLAIM, Kind.RESULT]
    assert own[3]["fence"] == own[2]["fence"] > own[0]["fence"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    folder = make_input(tmp_path / "in", [{"seconds": 0.2}] * 4 + [{"seconds": 30.0}] * 4)
    out = tmp_path / "out"
    running = driver(folder, out)
    until(lambda: num_results(out) == 4)
    running.send_signal(number)
    running.communicate(timeout=PATIENCE_S)
    assert running.returncode == STOPPED
    kinds = Counter(event["kind"] for event in events(out))
    assert kinds[Kind.CLAIM] == kinds[Kind.RESULT] + kinds[Kind.RELEASED] == 8
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 0}))
    finish(driver(folder, out, "--resume"))
    assert_whole(folder, out)


def test_two_drivers_on_one_directory_never_double(tmp_path: Path) -> None:
    folder = make_input(tmp_path / "in", [{"seconds": 0.4}] * 24)
    out = tmp_path / "out"
    first = driver(folder, out, "--workers", "1")
    until(lambda: num_results(out) >= 2)
    second = driver(folder, out, "--workers", "1", "--resume")
    unasked = driver(folder, out, "--workers", "1")
    _, said = unasked.communicate(timeout=PATIENCE_S)
    assert unasked.returncode == GIVEN_UP
    assert "--resume" in said
    finish(first)
    finish(second)
    assert_whole(folder, out)
    drivers = {event["worker"].split("-")[0] for event in events(out) if "worker" in event}
    assert len(drivers) == 2
    assert {event["kind"] for event in events(out)} == {Kind.CLAIM, Kind.RESULT}


def test_two_shards_at_once_make_one_manifest(tmp_path: Path) -> None:
    folder, out = make_input(tmp_path / "in", [{"seconds": 0.1}] * 9), tmp_path / "out"
    shards = [driver(folder, out, "--workers", "1", "--shard", f"{index}/2") for index in (0, 1)]
    for shard in shards:
        finish(shard)
    manifest = assert_whole(folder, out)
    assert [case["attempts"] for case in manifest["cases"]] == [1] * 9
