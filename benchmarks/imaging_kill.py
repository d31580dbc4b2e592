"""SIGKILL of driver, workers and replicas of a CT batch at random moments: no case is lost.

    python -m benchmarks.imaging_kill --good 50 --broken 10 --kills 3

The real command on a local platform; half of the good cases are DICOM, half NIfTI, the others
are broken in ten ways.  After each death of the driver another one resumes.  At the end every
case must be in the manifest once, the good ones with all their outputs, the broken ones with
their reason, and ``trimoe imaging verify`` must pass.  Weights are untrained.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, NoReturn

from apps.imaging.batch.claims import Kind
from apps.imaging.batch.journal import decode_lines
from apps.imaging.batch.layout import Layout
from apps.imaging.batch.manifest import read_manifest
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reasons import Status
from benchmarks.imaging_cases import volumes, write_cases
from benchmarks.imaging_faults import write_faults
from benchmarks.imaging_rig import Desk
from benchmarks.untrained_organs import write_untrained
from cluster.errors import ConfigurationError

TITLES: Mapping[str, str] = {  # how Ray names their processes
    "worker": "ray::Worker",
    "replica": "ray::ServeReplica:",
}
RESULTS = "results"
WORKERS = 2
LAST_SHARE = 0.75  # of the cases settled: a later kill might find nothing to kill
JITTER_S = 0.5  # after a case has settled, so that kills fall into all stages
LOOK_S = 0.1
PATIENCE_S = 600.0


class Plan(NamedTuple):
    """What is run and killed.

    Args:
        good: Cases that must come out correct.
        broken: Cases that must be quarantined, each broken in its own way.
        kills: Of the driver, of workers and of replicas, each.
        seed: Of moments and order.
        sample: Cases that are run again in the end.
    """

    good: int = 50
    broken: int = 10
    kills: int = 3
    seed: int = 0
    sample: int = 3


class Hunt:
    """A batch that is run by the command, whose processes are killed.

    Args:
        desk: Where the command runs.
        studies: What it runs over.
        seed: Of the moments and of their order.
    """

    def __init__(self, desk: Desk, studies: Path, seed: int) -> None:
        self._desk, self._studies = desk, studies
        self._chosen = random.Random(seed)  # noqa: S311 - no secret
        self._began_s = time.monotonic()
        self.layout = Layout(desk.folder / RESULTS)
        self.kills: list[Mapping[str, object]] = []
        self.num_runs = 0
        self._start()

    def run(self, num_cases: int, num_each: int) -> None:
        """Kill so many of each kind, in random order, and let the batch end.

        Raises:
            ConfigurationError: It ended badly, or before all were killed.
            TimeoutError: It makes no progress.
        """
        victims = num_each * ["driver", *TITLES]
        self._chosen.shuffle(victims)
        moments = sorted(self._chosen.uniform(0, LAST_SHARE * num_cases) for _ in victims)
        for victim, moment in zip(victims, moments, strict=True):
            self._await(partial(self._has_come, moment))
            time.sleep(self._chosen.uniform(0, JITTER_S))
            self._await(partial(self._hit, victim))
            if victim == "driver":
                self._driver.wait()
                self._start()
        if self._driver.wait(PATIENCE_S) != 0:
            self._fail("a batch that ends well")

    def stop(self) -> None:
        """End what still runs."""
        self._driver.kill()
        self._driver.wait()

    def _start(self) -> None:
        words = ["run", str(self._studies), "--out", RESULTS, "--workers", str(WORKERS)]
        self._driver = self._desk.start(*words, *(["--resume"] if self.num_runs else []))
        self.num_runs += 1

    def _has_come(self, moment: float) -> bool:
        return len(settled_in(self.layout)) >= moment

    def _hit(self, victim: str) -> bool:
        """Kill a process of a kind; return whether there was one."""
        driver = self._driver.pid
        pids = [driver] if victim == "driver" else titled_below(driver, TITLES[victim])
        if not pids:
            return False
        settled = len(settled_in(self.layout))
        try:
            os.kill(self._chosen.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return False
        at_s = round(time.monotonic() - self._began_s, 1)
        self.kills.append({"victim": victim, "settled": settled, "at_s": at_s})
        return True

    def _await(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            if self._driver.poll() is not None:
                self._fail("a batch that still runs")
            if time.monotonic() > deadline_s:
                message = f"batch: expected progress within {PATIENCE_S:.0f} s, got none"
                raise TimeoutError(message)
            time.sleep(LOOK_S)

    def _fail(self, expected: str) -> NoReturn:
        last = " ".join(self._desk.said.splitlines()[-3:])
        status = self._driver.returncode
        message = f"trimoe imaging run: expected {expected}, got status {status}: {last}"
        raise ConfigurationError(message)


def titled_below(root: int, title: str) -> list[int]:
    """Return the processes below a process whose title begins so."""
    parents, titles = dict[int, int](), dict[int, str]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ends just now
            pid, stat = int(folder.name), (folder / "stat").read_text()
            parents[pid] = int(stat.rpartition(")")[2].split()[1])
            titles[pid] = (folder / "cmdline").read_bytes().decode(errors="replace")
    return [
        pid
        for pid, name in titles.items()
        if name.startswith(title) and root in _line_of(pid, parents)
    ]


def _line_of(pid: int, parents: Mapping[int, int]) -> set[int]:
    """Return a process's parent, the parent of that, and so on."""
    line = set[int]()
    while (pid := parents.get(pid, 0)) and pid not in line:
        line.add(pid)
    return line


def settled_in(layout: Layout) -> list[str]:
    """Return the cases that have a result in the journal, as often as they have one."""
    if not layout.journal.exists():
        return []
    records, _ = decode_lines(layout.journal.read_bytes())
    return [each["case"] for each in records[1:] if each["kind"] == Kind.RESULT]


def problems_of(
    layout: Layout, studies: Path, num_slices: Mapping[str, int], reasons: Mapping[str, str]
) -> list[str]:
    """Return what is wrong with a batch that has ended, nothing if all is well.

    Args:
        layout: Of its directory.
        studies: What it ran over.
        num_slices: Of each good case, by its name.
        reasons: Code that each broken case must be quarantined with, by its name.
    """
    manifest = read_manifest(layout.manifest)
    case_ids = Counter(case["case_id"] for case in manifest["cases"])
    problems = []
    if case_ids != Counter(each.case_id for each in discover(studies, Bounds()).sources):
        problems.append("the manifest does not hold every case once")
    if case_ids != Counter(settled_in(layout)):
        problems.append("the journal does not hold a result of every case once")
    if list(layout.attempts.iterdir()):
        problems.append("attempts are left")
    names = Counter(name_of(case["source"]) for case in manifest["cases"])
    if names != Counter([*num_slices, *reasons]):
        problems.append(f"expected cases {sorted([*num_slices, *reasons])}, got {sorted(names)}")
    for case in manifest["cases"]:
        name = name_of(case["source"])
        found = [case["status"], case["num_slices"], *(each["code"] for each in case["reasons"])]
        if name in reasons:
            is_right = found[:3] == [Status.QUARANTINED, 0, reasons[name]]
            wanted = {"report"}
        else:
            is_right = found == [Status.CORRECT, num_slices.get(name)]
            wanted = {"report", "labels", "confidence", "pdf"}
        if not is_right:
            problems.append(f"{name}: got {found}")
        if not wanted <= case["outputs"].keys():
            problems.append(f"{name}: expected outputs {sorted(wanted)}")
        missing = [path for path in case["outputs"].values() if not (layout.root / path).is_file()]
        if missing:
            problems.append(f"{name}: {len(missing)} outputs are missing")
    return problems


def name_of(source: str) -> str:
    """Return the name that a study was written under: ``good/case-001.nii.gz`` is ``case-001``."""
    return source.split("/")[1].removesuffix(".nii.gz")


def kill_run(work: Path, plan: Plan, data: Path | None = None) -> dict[str, object]:
    """Write studies, run them under fire, and return the counts.

    Args:
        work: Folder for studies and results.
        plan: What is run and killed.
        data: Folder of OpenKBP patients for the good cases; None generates phantoms.
    """
    began_s = time.monotonic()
    studies = work / "studies"
    num_slices = write_cases(plan.good, studies / "good", data)
    reasons = write_faults(next(volumes(1)), studies / "broken", plan.broken)
    desk = Desk.at(work / "desk", write_untrained(work / "untrained"))
    hunt = Hunt(desk, studies, plan.seed)
    try:
        hunt.run(plan.good + plan.broken, plan.kills)
    finally:
        hunt.stop()
    problems = problems_of(hunt.layout, studies, num_slices, reasons)
    cases = read_manifest(hunt.layout.manifest)["cases"]
    try:
        desk.run("verify", RESULTS, "--sample", str(plan.sample), "--workers", str(WORKERS))
    except ConfigurationError as error:
        problems.append(str(error))
    return {
        "cases": len(cases),
        "statuses": dict(Counter(case["status"] for case in cases)),
        "attempts": sum(case["attempts"] for case in cases),
        "kills": hunt.kills,
        "runs": hunt.num_runs,
        "problems": problems,
        "seconds": round(time.monotonic() - began_s, 1),
    }


def main() -> int:
    """Print the counts as one JSON line; exit 0 only if all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--good", type=int, default=Plan().good, help="cases that are whole")
    parser.add_argument("--broken", type=int, default=Plan().broken, help="at most 10")
    parser.add_argument("--kills", type=int, default=Plan().kills, help="of each kind")
    parser.add_argument("--seed", type=int, default=Plan().seed)
    parser.add_argument("--data", type=Path, metavar="DIR", help="OpenKBP; default: phantoms")
    args = parser.parse_args()
    plan = Plan(args.good, args.broken, args.kills, args.seed)
    with TemporaryDirectory(prefix="trimoe-kill-") as work:
        counts = kill_run(Path(work), plan, args.data)
    print(json.dumps(counts))
    return 1 if counts["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
