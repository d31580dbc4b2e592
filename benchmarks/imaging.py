"""``trimoe bench imaging``: time per CT case beside dense networks, and cases per hour of a batch.

One case is a generated series of 512 x 512 x 400 as uncompressed DICOM, on a 3 mm grid, whole:
    ours    this process, model loaded, in-process client; the first case is not counted
    peers   MONAI's networks of ``trimoe imaging evaluate``, each case a process of its own
            (``imaging_peer``), in turn with ours; their weights are untrained, which the time
            to infer does not depend on, and what comes after it is done on the true labels;
            which of them has the Dice of ours, ``trimoe imaging evaluate`` says

Files are in the page cache.  What is written beside the report is timed apart.  The batch is
the real command on a local platform: generated cases, or patients of OpenKBP.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch

from apps.imaging.calibration import FILE, Calibration
from apps.imaging.launch import MODEL
from apps.imaging.outputs.settings import Kind
from apps.imaging.outputs.write import write_files, write_report
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.segmentation import Stopwatch, segment
from apps.imaging.training.baselines import Kind as Peer
from apps.imaging.training.baselines import make_net
from benchmarks.imaging_cases import SERIES, studies, whole_body
from benchmarks.imaging_rig import OUTPUTS, ROOT, Desk, models_of
from benchmarks.results import RESULTS, append_row
from cluster.errors import ConfigurationError
from cluster.local import LocalClient

PEERS: tuple[Peer, ...] = get_args(Peer)
BUDGET_S = {"cpu": 6.0, "cuda": 2.0}  # of a case up to its report, on 2 cores and on an H200 host
WRITERS: Mapping[str, frozenset[Kind]] = {
    "seg_sr": frozenset({Kind.SEGMENTATION, Kind.MEASUREMENTS}),
    "nifti": frozenset({Kind.NIFTI}),
    "pdf": frozenset({Kind.PDF}),
    "capture": frozenset({Kind.CAPTURE}),
    "overlays": frozenset({Kind.OVERLAYS}),
}
Seconds = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class CaseTrial:
    """One series, again and again.

    Args:
        case: Folder of it, see ``whole_body``.
        models: Folder of the organ model and its calibration.
        work: Folder to write to.
        device: Where models run.
    """

    case: Path
    models: Path
    work: Path
    device: str

    def ours(self, client: LocalClient) -> tuple[Seconds, Seconds]:
        """Return the seconds of each stage up to the report, and of each output beside it.

        Raises:
            ConfigurationError: The series cannot be read.
        """
        calibration, out = Calibration.load(self.models / FILE), self.work / "ours"
        watch = Stopwatch()
        (source,) = discover(self.case / SERIES, Bounds()).sources
        case = read_case(source, Bounds())
        if case.stack is None:
            message = f"{self.case.name}: expected a series, got {case.reasons[0].code}"
            raise ConfigurationError(message)
        watch.lap("read")
        findings = asyncio.run(segment(case, client, calibration))
        watch.lap("segment")
        write_report(case, findings, out, OUTPUTS)
        watch.lap("report")
        total = sum(watch.seconds.values())
        del watch.seconds["segment"]
        writing = Stopwatch()
        for name, kinds in WRITERS.items():
            write_files(case, findings, out, replace(OUTPUTS, kinds=kinds))
            writing.lap(name)
        stages = {"read": 0.0, **findings.seconds, **watch.seconds, "total": total}
        return stages, {**writing.seconds, "total": sum(writing.seconds.values())}

    def peer(self, kind: Peer) -> Seconds:
        """Return the seconds of each stage of a process; ``start`` is its interpreter and imports.

        Raises:
            ConfigurationError: The process failed.
        """
        weights = self.work / f"{kind}.pt"
        if not weights.exists():
            torch.save(make_net(kind).state_dict(), weights)
        command = [sys.executable, "-m", "benchmarks.imaging_peer", str(self.case)]
        command += ["--kind", kind, "--weights", str(weights), "--models", str(self.models)]
        command += ["--out", str(self.work / kind), "--device", self.device]
        began_s = time.perf_counter()
        done = subprocess.run(  # noqa: S603 - our own module
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
        total = time.perf_counter() - began_s
        if done.returncode != 0:
            message = f"{kind}: expected a case, got {done.stderr.strip().splitlines()[-1:]}"
            raise ConfigurationError(message)
        stages: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return {"start": total - sum(stages.values()), **stages, "total": total}


def quantiles(runs: Sequence[Seconds]) -> dict[str, dict[str, float]]:
    """Return p50 and p95 of each stage over runs."""
    return {
        name: {
            f"p{share}": round(float(np.quantile([run[name] for run in runs], share / 100)), 3)
            for share in (50, 95)
        }
        for name in runs[0]
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements and return their figures."""
    models = models_of(args.models)
    ours: list[Seconds] = []
    writing: list[Seconds] = []
    peers: dict[Peer, list[Seconds]] = {kind: [] for kind in PEERS}
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-bench-")))
        work = work.resolve()
        trial = CaseTrial(whole_body(work), models / MODEL, work, args.device)
        with LocalClient.from_checkpoint(models / MODEL, args.device) as client:
            trial.ours(client)
            for number in range(args.repeats):
                stages, written = trial.ours(client)
                ours.append(stages)
                writing.append(written)
                for kind in PEERS:
                    peers[kind].append(trial.peer(kind))
                totals = {kind: round(runs[-1]["total"], 1) for kind, runs in peers.items()}
                say(f"case {number + 1}: ours {stages['total']:.1f} s, peers {totals}")
        batch = run_cases(args, models, work) if args.cases else {}
    case = quantiles(ours)
    return {
        "case": case,
        "budget_s": BUDGET_S[args.device],
        "writing": quantiles(writing),
        "peers": {
            kind: {
                "ratio": round(found["total"]["p50"] / case["total"]["p50"], 2),
                **found,
            }
            for kind, found in ((kind, quantiles(runs)) for kind, runs in peers.items())
        },
        "peer_weights": "untrained",
        "batch": batch,
    }


def run_cases(args: argparse.Namespace, models: Path, work: Path) -> dict[str, float]:
    """Run a batch by the real command and return what it says of itself."""
    cases = studies(args.cases, work, args.data)
    with TemporaryDirectory(prefix="batch-", dir=work) as folder:
        desk, figures = Desk.at(Path(folder), models), Path(folder) / "figures.json"
        words = ["run", str(cases), "--out", "results", "--device", args.device]
        desk.run(*words, "--json", str(figures))
        said: dict[str, Any] = json.loads(figures.read_text("utf-8"))
    return {name: said[name] for name in ("cases", "quarantined", "seconds", "cases_per_h")}


def main(args: argparse.Namespace) -> int:
    """Run ``trimoe bench imaging``; the last line is one JSON object."""
    figures = measure(args)
    for name, stages in _tables(figures).items():
        print(f"{name}:")
        for stage, found in stages.items():
            print(f"  {stage:10} p50 {found['p50']:7.2f} s   p95 {found['p95']:7.2f} s")
    print("weights of the peers are untrained, which the time to infer does not depend on")
    path = append_row(args.results or RESULTS, "imaging", _row(args, figures))
    print(f"row appended to {path.name}")
    line = json.dumps(figures)
    if args.json:
        args.json.write_text(line + "\n", "utf-8")
    print(line)
    return 0


def _tables(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tables = {"ours, to the report": figures["case"], "ours, beside it": figures["writing"]}
    for kind, found in figures["peers"].items():
        name = f"{kind}, one process a case, {found['ratio']} times ours"
        tables[name] = {stage: value for stage, value in found.items() if stage != "ratio"}
    return tables


def _row(args: argparse.Namespace, figures: Mapping[str, Any]) -> dict[str, object]:
    """Return the figures as columns, seconds p50 unless they say otherwise."""
    case, peers = figures["case"], figures["peers"]
    return {
        "device": args.device,
        "model": "shipped" if args.models is None else args.models.name,
        "repeats": args.repeats,
        **{f"{stage}_s": found["p50"] for stage, found in case.items()},
        "total_p95_s": case["total"]["p95"],
        **{f"write_{name}_s": found["p50"] for name, found in figures["writing"].items()},
        **{f"{kind}_s": found["total"]["p50"] for kind, found in peers.items()},
        **{f"{kind}_ratio": found["ratio"] for kind, found in peers.items()},
        **{f"batch_{name}": value for name, value in figures["batch"].items()},
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
