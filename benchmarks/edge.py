"""``trimoe bench edge``: an edge model beside its cloud model and LightGBM, and the box itself.

    table     macro F1 and events caught at each horizon on the held-out end of the record, of the
              cloud model, its edge model, and LightGBM on the edge model's inputs as ONNX
    box       the real agent, one core: latencies, memory, time to start (``edge_box``)
    install   a fresh environment with ``trimoe[edge]``, in which the box then runs (--install)

The record is the generated fleet that the shipped weights were trained on, or with --data the
event logs of the Azure sample by its published split; its cloud model is trained into --work.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch

from apps.maintenance.azure import load_fleet
from apps.maintenance.edge.bundle import GOLDEN, INFO, MODEL, pack, read_info
from apps.maintenance.edge.forecast import Forecaster
from apps.maintenance.fleet import Floats32
from apps.maintenance.inputs import COLUMNS, Series, forecast_inputs
from apps.maintenance.protocol import HORIZONS
from apps.maintenance.simulate import SimulationConfig, simulate
from apps.maintenance.splits import Part, parts
from apps.maintenance.training.cloud import Cloud
from apps.maintenance.training.distill import EDGE, distil_part, opinions
from apps.maintenance.training.edge_report import CLOUD, compare, held_rows
from apps.maintenance.training.train import Recipe, train_part, training_part
from benchmarks.edge_box import Install, Trial, quantiles
from benchmarks.edge_peers import LIGHTGBM, OnnxTrees
from benchmarks.results import append_row
from cluster.onnx import INPUT_NAME
from core_model.checkpoint import WEIGHTS, read_manifest

SHIPPED = Path(__file__).parents[1] / "models" / "shared"
THREADS = 1  # of fits: LightGBM with two beside other work took five times as long
NUM_TIMED = 300  # rows of a model, one by one
TARGETS: Mapping[str, float] = {
    "forecast_p99_ms": 1.0,
    "rss_mb": 150.0,
    "start_s": 3.0,
    "install_mb": 150.0,
    "edge_bytes": 1e6,
}
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A record with the models that were trained on it.

    Args:
        part: Rows and their split.
        checkpoint: Folder of the cloud model.
        edge: Folder of the edge model.
        work: For what is made on the way.
        say: Progress.
    """

    part: Part
    checkpoint: Path
    edge: Path
    work: Path
    say: Say

    def table(self) -> dict[str, dict[str, Any]]:
        """Return the figures of all three models."""
        cloud, forecaster = Cloud.load(self.checkpoint), Forecaster(self.edge)
        period = int(cloud.calibration["service_period_hours"])
        features = forecaster.info.features
        peer = OnnxTrees(self.part, period, features, self.work, THREADS, self.say)
        said = opinions(self.part, cloud, period, forecaster) | {LIGHTGBM: peer.opinion()}
        figures = compare(self.part, said)
        series = self.moments()
        rows = [row[None] for row in self.columns(series, features)]
        alone = [series.take(np.array([idx])) for idx in range(len(rows))]
        sessions = peer.sessions()
        torch.set_num_threads(1)
        took = {
            CLOUD: _each_us(cloud.answer, alone),
            EDGE: _each_us(forecaster.forecast, rows),
            LIGHTGBM: _each_us(
                lambda row: [s.run(None, {INPUT_NAME: row}) for s in sessions], rows
            ),
        }
        size = {
            CLOUD: (self.checkpoint / WEIGHTS).stat().st_size,
            EDGE: (self.edge / MODEL).stat().st_size,
            LIGHTGBM: peer.num_bytes,
        }
        return {
            name: {"horizons": found, "us_per_row": took[name], "bytes": size[name]}
            for name, found in figures.items()
        }

    def moments(self, num: int = NUM_TIMED) -> Series:
        """Return moments of the test, drawn evenly."""
        rows = held_rows(self.part)
        kept = np.zeros(rows.size, bool)
        kept[np.linspace(0, rows.size - 1, num).astype(np.int64)] = True
        period = int(Cloud.load(self.checkpoint).calibration["service_period_hours"])
        return forecast_inputs(self.part.fleet, rows.take(kept), period)

    @staticmethod
    def columns(series: Series, names: Sequence[str]) -> Floats32:
        """Return the features of an edge model [N, D]."""
        return series.context[:, [COLUMNS.index(name) for name in names]]


def _each_us(call: Callable[[Any], object], rows: Sequence[Any]) -> float:
    """Return the median microseconds of a row asked alone."""
    took = []
    for row in rows:
        began = time.perf_counter()
        call(row)
        took.append((time.perf_counter() - began) * 1e6)
    return round(float(np.median(took)), 1)


def generated(args: argparse.Namespace, say: Say) -> Subject:
    """Return the fleet that the shipped weights were trained on, and its models."""
    part = training_part(simulate(SimulationConfig()))
    return _distilled(args, part, args.checkpoint or SHIPPED, say)


def azure(args: argparse.Namespace, say: Say) -> Subject:
    """Return the event logs of the Azure sample, with models trained unless they are there."""
    part = parts(load_fleet(args.data))[0]
    checkpoint = args.checkpoint or args.work / f"azure-{part.name}"
    if not (checkpoint / WEIGHTS).exists():
        recipe = Recipe(
            part=part,
            out=checkpoint,
            work=args.work / "azure-work",
            seed=0,
            preset=args.preset,
            device=args.device,
            source="Azure PdM sample, event logs before 2015-08-01; not to be passed on",
            command="trimoe bench edge --data azure_pdm",
        )
        train_part(recipe, say)
    return _distilled(args, part, checkpoint, say)


def _distilled(args: argparse.Namespace, part: Part, checkpoint: Path, say: Say) -> Subject:
    """Return a subject whose edge model is distilled here unless it is there."""
    digest = read_manifest(checkpoint).sha256[:12]
    work = args.work / f"{part.name}-{digest}"
    edge = work / "edge"
    if not (edge / INFO).exists() or not Forecaster(edge).info.accuracy:
        distil_part(part, checkpoint, edge, seed=0, threads=THREADS, say=say)
    return Subject(part, checkpoint, edge, work, say)


def main(args: argparse.Namespace) -> int:
    """Measure, print, append a row."""
    began_s = time.monotonic()
    args.work = args.work or Path(gettempdir()) / "trimoe-bench-edge"

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began_s:5.0f} s] {text}", file=sys.stderr, flush=True)

    subject = azure(args, say) if args.data else generated(args, say)
    table = subject.table()
    figures = {"data": subject.part.name, **box_figures(args, subject, say), "table": table}
    figures["met"] = {
        name: figures[name] <= limit for name, limit in TARGETS.items() if name in figures
    }
    print("\n".join([*_lines(table), *_box_lines(figures)]))
    path = append_row(args.results or Path(__file__).parent / "results", "edge", _row(figures))
    print(f"row appended to {path.name}")
    line = json.dumps(figures)
    if args.json:
        args.json.write_text(line + "\n", "utf-8")
    print(line)
    return 0


def box_figures(args: argparse.Namespace, subject: Subject, say: Say) -> dict[str, Any]:
    """Return what the box does, on one core."""
    info = read_info(subject.edge)
    packed = pack(info, *((subject.edge / name).read_bytes() for name in (GOLDEN, MODEL)))
    rows = subject.columns(subject.moments(args.windows), info.features)
    fresh, found = Install(args.work / "install"), dict[str, Any]()
    bare = fresh.make() if args.install else 0.0
    say("a box is set up")
    trial = Trial(subject.work / "trial", packed, info.features, rows)
    trial.set_up()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        for name, values in trial.latencies().items():
            found |= {f"{name}_{q}_ms": v for q, v in quantiles(values).items()}
        found |= trial.process(fresh.python if args.install else Path(sys.executable))
    finally:
        os.sched_setaffinity(0, cores)
    if args.install:  # after the run: what it compiled counts
        found |= {"venv_mb": round(fresh.megabytes, 1)}
        found |= {"install_mb": round(fresh.megabytes - bare, 1)}
    return {**found, "edge_bytes": (subject.edge / MODEL).stat().st_size}


def _lines(table: Mapping[str, Any]) -> list[str]:
    lines = ["  h   model     macro F1  PR-AUC  caught  of cloud's  false/month"]
    for horizon in map(str, HORIZONS):
        for name, figures in table.items():
            found = figures["horizons"][horizon]
            lines.append(
                f"  {horizon:3} {name:9} {found['macro_f1']:.4f}    {found['pr_auc']:.4f}  "
                f"{found['events_caught']:.3f}   {found['share_of_cloud']:.3f}       "
                f"{found['false_alarms_per_machine_month']:.3f}"
            )
    costs = (f"{n} {f['us_per_row']:g} us, {f['bytes']} bytes" for n, f in table.items())
    return [*lines, "a row asked alone: " + "; ".join(costs)]


def _box_lines(figures: Mapping[str, Any]) -> list[str]:
    kept = (n for n, v in figures.items() if isinstance(v, int | float))
    missed = [name for name, is_met in figures["met"].items() if not is_met]
    return [
        ", ".join(f"{name} {figures[name]:g}" for name in kept),
        f"missed: {', '.join(missed) or 'none'} of {', '.join(figures['met'])}",
    ]


def _row(figures: Mapping[str, Any]) -> dict[str, object]:
    """Return the figures as columns; every row has the same ones."""
    table = figures["table"]
    columns = [f"{name}_{q}_ms" for name in ("model", "forecast", "turn") for q in ("p50", "p99")]
    columns += ["start_s", "rss_mb", "rss_peak_mb", "venv_mb", "install_mb", "edge_bytes"]
    return {
        "data": figures["data"],
        **{name: figures.get(name, "") for name in columns},
        **{
            f"{model}_{key}_{h}h": round(found["horizons"][str(h)][key], 4)
            for model, found in table.items()
            for key in ("macro_f1", "events_caught", "share_of_cloud")
            for h in HORIZONS
        },
        **{f"{model}_us": found["us_per_row"] for model, found in table.items()},
        **{f"{model}_bytes": found["bytes"] for model, found in table.items()},
    }
