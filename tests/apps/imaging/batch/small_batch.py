"""A batch of small cases in real processes, without Ray: driver, workers and their supervision.

Run as a script it is a driver.  A case is a JSON file that says how it behaves:

    {"seed": 3, "seconds": 0.2, "how": "plain" | "poison" | "raises" | "unreadable"}

A worker does not import what a driver alone needs: it would start three times as slowly.
Whoever runs a case holds a lock on ``locks/<case id>`` beside the input, so a second one at
the same time would be seen: it leaves ``doubled/<case id>``.
"""

import argparse
import asyncio
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.imaging.batch.plan import Batch, Shard
from apps.imaging.batch.process import Application
from apps.imaging.batch.workers import WorkerPlan, WorkerSettings
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import Inventory, Member, SetAside, Source, SourceKind, case_id_of
from apps.imaging.reasons import Reason, Status
from cluster.client import Client
from cluster.errors import ConfigurationError, TrimoeError, UnavailableError
from cluster.schemas import InferRequest, InferResponse

if TYPE_CHECKING:
    from apps.imaging.batch.driver import Outcome

ROOT = Path(__file__).parents[4]
MODEL = "small-1"
GIVEN_UP = 3
STOPPED = 4


class SilentClient:
    """Nobody answers; the cases here do not ask."""

    async def infer(self, request: InferRequest) -> InferResponse:
        message = f"request {request.request_id}: nobody is there"
        raise UnavailableError(message)


def make_input(folder: Path, cases: Sequence[Mapping[str, Any]]) -> Path:
    """Write cases and return their folder; what they do not say is plain."""
    folder.mkdir(parents=True)
    for number, case in enumerate(cases):
        record = {"seed": number, "seconds": 0.0, "how": "plain", **case}
        (folder / f"{number:03d}.json").write_text(json.dumps(record))
    (folder / "notes.txt").write_text("not a case")
    return folder


def discover(root: Path) -> Inventory:
    """Find the cases of a folder."""
    sources = tuple(
        Source(case_id_of(path.name, ""), path.name, "", SourceKind.NIFTI, (Member(path),))
        for path in sorted(root.glob("*.json"))
    )
    left = tuple(
        SetAside(path.name, Reason("NOT_AN_IMAGE", "no case")) for path in root.glob("*.txt")
    )
    return Inventory(sources, left)


async def process(source: Source, directory: Path, _client: Client) -> CaseSummary:
    """Run a case: two files, one before and one after the time it takes."""
    path = source.members[0].path
    case = json.loads(path.read_text())
    with running_alone(path.parent.parent, source.case_id):
        values = np.random.default_rng(case["seed"]).integers(0, 255, 2000, np.uint8)
        (directory / "labels.bin").write_bytes(values.tobytes())
        await asyncio.sleep(case["seconds"])
        if case["how"] == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        if case["how"] == "raises":
            message = "Doe^Jane cannot be read"
            raise ValueError(message)
        (directory / "more").mkdir()
        (directory / "more" / "sum.json").write_text(json.dumps(int(values.sum())))
    if case["how"] == "unreadable":
        reasons = (Reason("NOT_READABLE", "no slices"),)
        return CaseSummary(source.case_id, source.label, "", Status.QUARANTINED, reasons)
    return CaseSummary(
        source.case_id,
        source.label,
        source.series_uid,
        Status.CORRECT,
        num_slices=3,
        slice_positions_mm=(0.0, 5.0, 10.0),
        confidence_case=0.9,
        model_version=MODEL,
        outputs={"values": "labels.bin", "sum": "more/sum.json"},
    )


@contextmanager
def running_alone(place: Path, case_id: str) -> Iterator[None]:
    """Hold the lock of a case, which names this process; note if another one has it."""
    for name in ("locks", "doubled"):
        (place / name).mkdir(exist_ok=True)
    with (place / "locks" / case_id).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (place / "doubled" / case_id).touch()
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)


def report(summaries: Sequence[CaseSummary], directory: Path, _busy_s: float) -> Mapping[str, str]:
    """Write the report of a batch."""
    (directory / "index.html").write_text(f"{len(summaries)} cases")
    return {"batch_report": "index.html"}


APPLICATION = Application(discover, process, report, {"task": "small"})


class ProcessCrew:
    """Workers in processes of their own; one that is killed is started anew."""

    def __init__(self, plan: WorkerPlan, num_workers: int) -> None:
        self.plan = plan
        self.num_restarts = 0
        self.processes = [self._start(index) for index in range(num_workers)]

    def _start(self, index: int) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable,
            "-m",
            "tests.apps.imaging.batch.small_batch",
            "--work",
            str(index),
        ]
        running = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
        assert running.stdin is not None
        running.stdin.write(pickle.dumps(self.plan))
        running.stdin.close()
        return running

    def wait(self, timeout_s: float | None = None) -> bool:
        assert timeout_s == 0.0
        for index, running in enumerate(self.processes):
            code = running.poll()
            if code == GIVEN_UP:
                message = "a worker was given up"
                raise ConfigurationError(message)
            if code not in (None, 0):
                self.num_restarts += 1
                self.processes[index] = self._start(index)
        return all(running.poll() == 0 for running in self.processes)

    def stop(self) -> None:
        for running in self.processes:
            running.terminate()
        for running in self.processes:
            running.wait(timeout=20)


@contextmanager
def hire(plan: WorkerPlan, *, num_workers: int = 2) -> Iterator[ProcessCrew]:
    """Run workers while the block does."""
    crew = ProcessCrew(plan, num_workers)
    try:
        yield crew
    finally:
        crew.stop()


class ThreadCrew:
    """One worker in a thread of this process."""

    def __init__(self, plan: WorkerPlan, client: Client) -> None:
        self.service = plan(0, 1, client)
        self.loop = asyncio.new_event_loop()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self.service.run())
        except TrimoeError as error:
            self.error = error

    def wait(self, timeout_s: float | None = None) -> bool:
        self.thread.join(timeout_s)
        if self.error is not None:
            raise self.error
        return not self.thread.is_alive()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.service.request_stop)
        self.thread.join()
        self.loop.close()


@contextmanager
def hire_thread(plan: WorkerPlan, client: Client | None = None) -> Iterator[ThreadCrew]:
    """Run one worker in a thread while the block does."""
    crew = ThreadCrew(plan, client or SilentClient())
    try:
        yield crew
    finally:
        crew.stop()


async def work(plan: WorkerPlan, index: int) -> None:
    """Run one worker until it ends, or SIGTERM."""
    service = plan(index, 0, SilentClient())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, service.request_stop)
    await service.run()


def drive(args: argparse.Namespace) -> "Outcome":
    """Run a driver to its end."""
    from apps.imaging.batch.driver import run_batch
    from apps.imaging.batch.evidence import signing_key
    from apps.imaging.batch.progress import progress_on
    from apps.imaging.launch import stop_on_signal

    root = args.input.resolve()
    batch = Batch(
        APPLICATION,
        root,
        discover(root),
        args.out.resolve(),
        Shard.parse(args.shard),
        WorkerSettings(in_flight=args.in_flight, lease_s=args.lease_s, look_s=0.05, drain_s=0.2),
    )
    key = signing_key(args.out.resolve().parent / "key.pem")
    with (
        stop_on_signal(partial(hire, num_workers=args.workers)) as (hired, stopping),
        progress_on(sys.stderr) as show,
    ):
        return run_batch(batch, hired, key, is_resumed=args.resume, stopping=stopping, show=show)


def run_here(folder: Path, out: Path, *, is_resumed: bool = False, shard: str = "0/1") -> "Outcome":
    """Run a driver in this process, its worker in a thread."""
    from apps.imaging.batch.driver import run_batch
    from apps.imaging.batch.evidence import signing_key

    batch = Batch(
        APPLICATION,
        folder,
        discover(folder),
        out,
        Shard.parse(shard),
        WorkerSettings(look_s=0.01, drain_s=0.2),
    )
    return run_batch(
        batch,
        hire_thread,
        signing_key(out.parent / "key.pem"),
        is_resumed=is_resumed,
        stopping=threading.Event(),
        show=lambda _: None,
    )


def main() -> int:
    """Be a driver, or with ``--work`` one of its workers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=int)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--in-flight", type=int, default=2)
    parser.add_argument("--lease-s", type=float, default=30.0)
    args = parser.parse_args()
    try:
        if args.work is not None:
            asyncio.run(work(pickle.loads(sys.stdin.buffer.read()), args.work))
            return 0
        return 0 if drive(args).is_done else STOPPED
    except TrimoeError as error:
        sys.stderr.write(f"{error}\n")
        return GIVEN_UP


if __name__ == "__main__":
    sys.exit(main())
