"""One worker in this process: what it does when cases, the platform or the disk fail."""

import asyncio
import errno
import json
import pickle
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from apps.imaging.batch.claims import Event, Kind, RetryLimits
from apps.imaging.batch.journal import decode_lines
from apps.imaging.batch.lease import Lease
from apps.imaging.batch.plan import Batch, open_batch
from apps.imaging.batch.process import Application
from apps.imaging.batch.workers import CaseWorker, WorkerPlan, WorkerSettings
from apps.imaging.outputs.errors import OutputError
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import Inventory, Source, SourceKind
from apps.imaging.reasons import Status
from cluster.client import Client
from cluster.errors import ConfigurationError, DeadlineExceededError, UnknownModelError
from tests.apps.imaging.batch.small_batch import SilentClient, process, report

SETTINGS = WorkerSettings(
    limits=RetryLimits(max_attempts=2, max_unavailable=3),
    look_s=0.01,
    first_pause_s=0.01,
    drain_s=0.1,
)
Behaviour = Callable[[int], Coroutine[Any, Any, None]]


@dataclass
class Scripted:
    """A process whose cases do what is said: ``await behaviour(attempt number)``."""

    behaviours: dict[str, Behaviour]
    calls: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    beside: list[set[str]] = field(default_factory=list)
    begun: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def has_begun(self, num: int) -> None:
        for _ in range(num):
            await self.begun.acquire()

    async def __call__(self, source: Source, directory: Path, _client: Client) -> CaseSummary:
        self.calls.append(source.case_id)
        self.begun.release()
        self.running.add(source.case_id)
        self.beside.append(set(self.running))
        try:
            if source.case_id in self.behaviours:
                await self.behaviours[source.case_id](self.calls.count(source.case_id))
            (directory / "out.txt").write_text(source.case_id)
        finally:
            self.running.remove(source.case_id)
        return CaseSummary(
            source.case_id, source.label, "", Status.CORRECT, outputs={"out": "out.txt"}
        )


class Bench:
    """An output directory with a batch of cases, and a worker for it."""

    def __init__(self, folder: Path, **behaviours: Behaviour) -> None:
        self.process = Scripted(behaviours)
        self.sources = tuple(Source(name, name, "", SourceKind.NIFTI, ()) for name in "abcd")
        application = Application(lambda _: Inventory(self.sources, ()), self.process, report)
        self.batch = Batch(application, folder / "in", Inventory(self.sources, ()), folder / "out")
        open_batch(self.batch, is_resumed=False).close()
        self.leases = folder / "out" / "batch" / "leases"

    def worker(self, settings: WorkerSettings = SETTINGS) -> CaseWorker:
        plan = WorkerPlan(self.batch.out, "d0", self.sources, self.process, settings)
        return plan(0, 1, SilentClient())

    def run(self, settings: WorkerSettings = SETTINGS) -> None:
        with Lease(self.leases, "d0", 30.0):
            asyncio.run(asyncio.wait_for(self.worker(settings).run(), 20))

    def ends(self, case_id: str) -> list[str]:
        """How the attempts at a case ended."""
        records, _ = decode_lines((self.batch.out / "batch" / "journal").read_bytes())
        kinds = [each["kind"] for each in records[1:] if each["case"] == case_id]
        return [kind for kind in kinds if kind != Kind.CLAIM]

    def result(self, case_id: str) -> CaseSummary:
        records, _ = decode_lines((self.batch.out / "batch" / "journal").read_bytes())
        (found,) = (
            each["result"] for each in records[1:] if each["case"] == case_id and "result" in each
        )
        return CaseSummary.from_json(found["summary"])


def raises(*errors: Exception) -> Behaviour:
    """Raise these, one an attempt, then go on well."""

    async def behave(number: int) -> None:
        if number <= len(errors):
            raise errors[number - 1]

    return behave


async def takes_a_moment(_number: int) -> None:
    await asyncio.sleep(0.05)


async def takes_long(_number: int) -> None:
    await asyncio.sleep(30)


def test_all_cases_are_run_and_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a=takes_a_moment, b=takes_a_moment)
    bench.run()
    assert sorted(bench.process.calls) == list("abcd")
    for case_id in "abcd":
        assert bench.ends(case_id) == ["result"]
        assert bench.result(case_id).outputs == {"out": f"cases/{case_id}/out.txt"}
        assert (tmp_path / "out" / "cases" / case_id / "out.txt").read_text() == case_id
    assert max(map(len, bench.process.beside)) == SETTINGS.in_flight
    assert list(bench.leases.iterdir()) == []


def test_a_case_that_fails_once_is_tried_again_after_the_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a=raises(ValueError("once")))
    bench.run(replace(SETTINGS, in_flight=1))
    assert bench.process.calls == ["a", "b", "c", "d", "a"]
    assert bench.ends("a") == ["failed", "result"]
    assert bench.result("a").status is Status.CORRECT


def test_a_case_that_always_fails_is_quarantined_without_its_words(tmp_path: Path) -> None:
    bench = Bench(tmp_path, b=raises(*[ValueError("Doe^Jane")] * 9))
    bench.run()
    assert bench.ends("b") == ["failed", "failed", "result"]
    found = bench.result("b")
    assert found.status is Status.QUARANTINED
    assert [reason.code for reason in found.reasons] == ["PROCESS_FAILED"]
    assert "ValueError at test_workers.py:" in found.reasons[0].detail
    journal = (bench.batch.out / "batch" / "journal").read_text()
    assert "Doe" not in journal
    assert [bench.ends(case_id) for case_id in "acd"] == [["result"]] * 3
    assert not (bench.batch.out / "cases" / "b").exists()


def test_an_attempt_that_takes_too_long_has_failed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, c=takes_long)
    bench.run(replace(SETTINGS, limit_s=0.1))
    assert bench.ends("c") == ["failed", "failed", "result"]
    assert bench.result("c").reasons[0].code == "TIME_LIMIT"


def test_a_timeout_of_the_process_itself_is_no_time_limit(tmp_path: Path) -> None:
    bench = Bench(tmp_path, c=raises(TimeoutError("a server"), TimeoutError("a server")))
    bench.run()
    assert bench.result("c").reasons[0].code == "PROCESS_FAILED"


def test_a_silent_platform_is_waited_for_and_nobodys_fault(tmp_path: Path) -> None:
    error = DeadlineExceededError("late")
    bench = Bench(tmp_path, a=raises(error, error))
    bench.run()
    assert bench.ends("a") == ["unavailable", "unavailable", "result"]
    assert bench.result("a").status is Status.CORRECT


def test_a_case_that_never_gets_an_answer_is_quarantined(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a=raises(*[DeadlineExceededError("late")] * 9))
    bench.run()
    assert bench.ends("a") == ["unavailable"] * 3 + ["result"]
    assert bench.result("a").reasons[0].code == "PLATFORM_UNAVAILABLE"


def test_a_platform_that_is_silent_for_long_ends_the_batch(tmp_path: Path) -> None:
    silent = raises(*[DeadlineExceededError("late")] * 99)
    bench = Bench(tmp_path, a=silent, b=silent, c=silent, d=silent)
    limits = RetryLimits(max_unavailable=50)
    with pytest.raises(ConfigurationError, match="--resume"):
        bench.run(replace(SETTINGS, limits=limits, patience_s=0.2))
    assert all(bench.ends(case_id).count("result") == 0 for case_id in "abcd")


@pytest.mark.parametrize(
    "error",
    [
        ConfigurationError("no such model"),
        UnknownModelError("no such model"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_what_no_case_can_get_around_ends_the_batch_and_is_charged_to_none(
    error: Exception, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, a=raises(error))
    with pytest.raises((ConfigurationError, UnknownModelError), match=r"expected room|such model"):
        bench.run(replace(SETTINGS, in_flight=1))
    assert bench.ends("a") == ["released"]
    assert list((bench.batch.out / "batch" / "attempts").iterdir()) == []


def test_a_full_disk_is_seen_behind_another_error(tmp_path: Path) -> None:
    def write() -> None:
        Path("/dev/full").write_text("x")

    async def fills(_number: int) -> None:
        try:
            await asyncio.to_thread(write)
        except OSError:
            message = "case a: expected to write its report, got OSError"
            raise OutputError(message) from None

    bench = Bench(tmp_path, a=fills)
    with pytest.raises(ConfigurationError, match="No space left"):
        bench.run()


def test_told_to_stop_a_worker_ends_what_it_can_and_gives_back_the_rest(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a=takes_a_moment, b=takes_long)

    async def scenario() -> None:
        worker = bench.worker()
        running = asyncio.create_task(worker.run())
        await bench.process.has_begun(2)
        worker.request_stop()
        await asyncio.wait_for(running, 5)

    with Lease(bench.leases, "d0", 30.0):
        asyncio.run(scenario())
    assert bench.process.calls == ["a", "b"]
    assert (bench.ends("a"), bench.ends("b")) == (["result"], ["released"])


def test_a_worker_whose_driver_is_gone_gives_back_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a=takes_long)

    patient = replace(SETTINGS, in_flight=1, drain_s=30.0)

    async def scenario() -> None:
        with Lease(bench.leases, "d0", 30.0):
            running = asyncio.create_task(bench.worker(patient).run())
            await bench.process.has_begun(1)
        await asyncio.wait_for(running, 5)

    asyncio.run(scenario())
    assert bench.process.calls == ["a"]
    assert bench.ends("a") == ["released"]


def test_a_suspect_runs_alone(tmp_path: Path) -> None:
    """A case under which an earlier driver was killed has no neighbour the next time."""
    bench = Bench(tmp_path)
    with open_batch(bench.batch, is_resumed=True) as journal, journal.locked():
        journal.append(Event(Kind.CLAIM, "a", 1, worker="gone-0-x"))
    bench.run()
    assert bench.ends("a") == ["orphaned", "result"]
    assert bench.process.calls[-1] == "a"
    assert bench.process.beside[-1] == {"a"}


def test_a_machine_without_the_directory_is_told_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    (bench.batch.out / "batch" / "journal").unlink()
    with pytest.raises(ConfigurationError, match="on this machine too"):
        bench.run()


def test_the_plan_travels(tmp_path: Path) -> None:
    plan = WorkerPlan(tmp_path, "d0", Bench(tmp_path).sources, process, SETTINGS)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert json.dumps([each.case_id for each in plan.sources]) == '["a", "b", "c", "d"]'
