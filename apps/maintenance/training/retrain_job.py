"""What a retraining computes: adapter and head tuned, an edge model distilled, a bundle packed.

    FOLDER/span.json       hours of the record that are learned from
    FOLDER/fleet-*.npz     cross-fitted trees; gate, cautions and margin
    FOLDER/checkpoint/     the tuned model
    FOLDER/edge/           the one distilled from it
    FOLDER/history.npz     windows that nothing has learned from, for the shadow
    FOLDER/bundle.tar      what is to be signed

Each part appears whole or not at all, and one that is there is not made again: a job that was
killed goes on where it was.  The last fifth of the hours is held out from everything.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from xgboost import Booster

from apps.maintenance.edge.bundle import BundleInfo
from apps.maintenance.edge.durable import write_whole
from apps.maintenance.fleet import Fleet, Floats32
from apps.maintenance.inputs import forecast_inputs
from apps.maintenance.protocol import HORIZONS, decide, hours_to_failure, labels, macro_f1
from apps.maintenance.splits import Part
from apps.maintenance.tables import read_fleet
from apps.maintenance.training.azure_runs import Runs
from apps.maintenance.training.fit import (
    Examples,
    Fit,
    ask,
)
from apps.maintenance.training.retrain_fit import TUNING, fine_tune
from apps.maintenance.training.retrain_record import Span, cut, find_drift, held_out, pack_edge
from apps.maintenance.training.train import (
    CALIBRATION,
    carry_trees,
    chosen_by,
    fit_weights,
    training_part,
    write_chosen,
)
from apps.maintenance.training.trees import ask_trees
from core_model.checkpoint import load_checkpoint, save_checkpoint
from core_model.model import MoETransformer

CHECKPOINT, EDGE, HISTORY, BUNDLE = "checkpoint", "edge", "history.npz", "bundle.tar"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Order:
    """A retraining to be computed.

    Args:
        folder: Of its parts.
        record: Folder of the plant's tables.
        deployed: Checkpoint of the deployed model.
        info: Of the deployed bundle.
        version: Of the bundle to be made.
        seed: Of everything.
        threads: Of the trees and the distillation.
    """

    folder: Path
    record: Path
    deployed: Path
    info: BundleInfo
    version: int
    seed: int = 0
    threads: int = 1


def run_order(order: Order, say: Say) -> Path:
    """Make all parts that are not there yet; return the bundle.

    Raises:
        FileNotFoundError, CheckpointError: The record or the deployed model is not there.
    """
    from apps.maintenance.training.distill import distil  # noqa: PLC0415 - heavy, and last

    torch.set_num_threads(1)
    order.folder.mkdir(parents=True, exist_ok=True)
    record = read_fleet(order.record)
    span = _span(order, record)
    fleet = cut(record, span)
    say(f"learns from {fleet.num_hours} hours, {fleet.failures.hour.size} failures")
    part = training_part(fleet)
    _whole(order.folder / CHECKPOINT, lambda draft: _tune(order, part, draft, say))

    def distil_into(draft: Path) -> None:
        tuned = order.folder / CHECKPOINT
        distil(fleet, tuned, draft, seed=order.seed, threads=order.threads, say=say)

    _whole(order.folder / EDGE, distil_into)
    say("distilled")
    horizon_h = int(order.info.alerts.horizon_h)
    held_out(part, horizon_h).write(order.folder / HISTORY)
    bundle = order.folder / BUNDLE
    write_whole(bundle, pack_edge(order.folder / EDGE, order.version, fleet))
    return bundle


def _span(order: Order, record: Fleet) -> Span:
    """Return the hours to learn from, chosen once."""
    path = order.folder / "span.json"
    if not path.exists():
        chosen = find_drift(record, order.info).span
        write_whole(path, json.dumps(asdict(chosen)).encode())
    return Span(**json.loads(path.read_bytes()))


def _whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder unless it is there; it appears whole or not at all."""
    if folder.exists():
        return
    draft = folder.with_name(f"draft-{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    make(draft)
    draft.rename(folder)


def _tune(order: Order, part: Part, out: Path, say: Say) -> None:
    """Write the tuned checkpoint and its calibration."""
    deployed, before = load_checkpoint(order.deployed)
    runs = Runs(part, order.folder, "cpu", "", order.threads, say)
    fit = Fit(order.seed, threads=order.threads, label="retraining", settings=TUNING)

    def make(kept: Examples, answers: Floats32, fit: Fit) -> MoETransformer:
        return fine_tune(deployed, kept, answers, fit)

    model, booster = fit_weights(runs, fit, make)
    carry_trees(model, booster)
    figures = _figures(model, booster, runs)
    say(f"tuned: {figures}")
    save_checkpoint(
        out,
        model,
        version=f"{before.version.rpartition('-')[0]}-{order.version}",
        data=f"folder {order.record.name}, hours after {part.fleet.start.isoformat()}",
        metrics=figures,
        command="trimoe sync retrain",
    )
    path = order.deployed / CALIBRATION
    before_it = json.loads(path.read_bytes()) if path.exists() else {}
    write_chosen(out, {**before_it, **chosen_by(runs, runs.calibration())})


def _figures(model: MoETransformer, booster: Booster, runs: Runs) -> dict[str, float]:
    """Return macro F1 by horizon on what was held out."""
    part, calibration = runs.part, runs.calibration()
    rows = part.rows.take(part.test(HORIZONS[-1]))
    series = forecast_inputs(part.fleet, rows, runs.period)
    probs = ask(model, series, ask_trees(booster, series.context), "cpu").probs
    hours = hours_to_failure(part.fleet.failures, rows, len(part.fleet.components))
    found = {}
    for idx, horizon in enumerate(HORIZONS):
        decided = decide(probs[:, idx], calibration.caution[horizon])
        truth = labels(hours, horizon)
        found[f"macro_f1_{horizon}h"] = round(macro_f1(truth, decided, probs.shape[2]), 4)
    return found
