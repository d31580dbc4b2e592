"""``trimoe maintenance distill``: the edge model of a cloud model, as a bundle for boxes.

    OUT/bundle.json, golden.npz, model.onnx   see ``apps.maintenance.edge.bundle``
    OUT/bundle.tar                            the three packed, for ``trimoe sync publish``

A student learns from the cloud model's answers on the training time of a fleet's record; the
last fifth is held out, and what the bundle says of its accuracy was measured there.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.maintenance.chances import SMALLEST
from apps.maintenance.edge.bundle import (
    GOLDEN,
    INFO,
    MODEL,
    AlertRule,
    BundleInfo,
    encode_golden,
    read_info,
)
from apps.maintenance.edge.durable import write_whole
from apps.maintenance.edge.forecast import Forecaster
from apps.maintenance.fleet import Fleet, Floats, Floats32, Ints
from apps.maintenance.inputs import COLUMNS, forecast_inputs
from apps.maintenance.protocol import HORIZONS
from apps.maintenance.splits import Part
from apps.maintenance.training.azure_runs import Runs
from apps.maintenance.training.cloud import Cloud
from apps.maintenance.training.edge_report import CLOUD, Opinion, compare, edge_probs, held_rows
from apps.maintenance.training.fit import FIRST_HAZARD, FIRST_HOURS, FIRST_SEQUENCE, class_probs
from apps.maintenance.training.retrain_record import pack_edge
from apps.maintenance.training.student import (
    SETTINGS,
    SHAPE,
    Lesson,
    fit_student,
)
from apps.maintenance.training.student_graph import to_onnx
from apps.maintenance.training.train import fleet_of, training_part
from core_model.series_tasks import FORECAST

EDGE = "edge"
BUNDLE = "bundle.tar"
ALERT_HORIZON = 48  # hours; of the alert rule
MOST_ALERTS = 4.0  # times the share in training, above which the model itself is suspected
LEAST_SUSPECT = 0.05  # share of windows with an alert that never is
MOST_ROWS = 100_000  # asked of the cloud model
NUM_GOLDEN = 64
GOLDEN_TOLERANCE = 5e-3  # life is in hours: a float32 of hundreds is rounded by some 1e-4
NEAR = 1.5  # of log odds around the cloud's threshold
_SPACING = 10  # of the rows from which the golden batch and the usual share of alerts are taken
_CHUNK = 256  # rows of one request, as an agent sends them


def distil(
    fleet: Fleet,
    checkpoint: Path,
    out: Path,
    *,
    seed: int,
    threads: int,
    say: Callable[[str], None],
) -> Path:
    """Write the edge model of a cloud model.

    Args:
        fleet: The record to learn on; its last fifth is held out.
        checkpoint: Folder of the cloud model.
        out: Folder of the bundle.
        seed: Of the student.
        threads: Of torch.
        say: Progress.

    Returns:
        ``out``.

    Raises:
        CheckpointError, FileNotFoundError: There is no cloud model.
    """
    return distil_part(training_part(fleet), checkpoint, out, seed=seed, threads=threads, say=say)


def distil_part(
    part: Part,
    checkpoint: Path,
    out: Path,
    *,
    seed: int,
    threads: int,
    say: Callable[[str], None],
) -> Path:
    """Write the edge model of a cloud model, learned and judged on the two times of a part."""
    torch.set_num_threads(threads)
    cloud = Cloud.load(checkpoint)
    runs = Runs(part, out, "cpu", "", threads, say)
    examples = runs.examples()
    share = MOST_ROWS / examples.machine.size
    examples = examples.take(np.random.default_rng(seed).random(examples.machine.size) < share)
    said = cloud.answer(examples.series)
    lesson = Lesson(said[:, FIRST_SEQUENCE:].reshape(SHAPE), said[:, FIRST_HOURS:FIRST_HAZARD])
    say(f"{cloud.version} answered {examples.machine.size} rows")
    context = examples.series.context
    columns = cloud.columns(context)
    student = fit_student(examples, columns, lesson, seed, SETTINGS)
    say("student trained")
    out.mkdir(parents=True, exist_ok=True)
    net = cloud.edge(student, columns)
    write_whole(out / MODEL, to_onnx(net))
    seen = context[::_SPACING][:, columns]
    hazard, life = net.forecast(seen)
    taught = class_probs(said[::_SPACING, FIRST_HAZARD:FIRST_SEQUENCE].numpy())
    caution = own_caution(cloud.caution, taught, edge_probs(hazard))
    shown = _golden_rows(hazard.max(axis=(1, 2)))
    golden = encode_golden(seen[shown], hazard[shown], life[shown], GOLDEN_TOLERANCE)
    write_whole(out / GOLDEN, golden)
    info = _info(cloud, part, seen, columns, hazard, caution)
    write_whole(out / INFO, info.to_json())
    forecaster = Forecaster(out)
    say(f"{MODEL}: {(out / MODEL).stat().st_size} bytes, {forecaster.prove():.1e} from the student")
    accuracy = _headline(compare(part, opinions(part, cloud, runs.period, forecaster)))
    write_whole(out / INFO, replace(info, accuracy=accuracy).to_json())
    say(", ".join(f"{name} {value:.4f}" for name, value in accuracy.items()))
    return out


def opinions(part: Part, cloud: Cloud, period: int, forecaster: Forecaster) -> dict[str, Opinion]:
    """Return what the cloud model and its edge model say of the rows of a part's test."""
    series = forecast_inputs(part.fleet, held_rows(part), period)
    said = class_probs(cloud.answer(series)[:, FIRST_HAZARD:FIRST_SEQUENCE].numpy())
    columns = [COLUMNS.index(name) for name in forecaster.info.features]
    hazard = [
        forecaster.forecast(series.context[first : first + _CHUNK, columns]).hazard
        for first in range(0, series.context.shape[0], _CHUNK)
    ]
    edge = edge_probs(np.concatenate(hazard))
    own = dict(zip(HORIZONS, forecaster.info.caution, strict=True))
    return {CLOUD: Opinion(said, cloud.caution), EDGE: Opinion(edge, own)}


def own_caution(caution: Mapping[int, float], cloud: Floats, edge: Floats) -> tuple[float, ...]:
    """Return the cautions at which an edge model alarms where its cloud model does.

    Near the cloud's threshold the edge model is a little above or below it; by one spread of
    that it is more wary.

    Args:
        caution: Of the cloud model, by horizon.
        cloud: Its probabilities of rows of the training time [N, H, 1 + C].
        edge: Those of the edge model.
    """
    own = []
    for i, horizon in enumerate(HORIZONS):
        threshold = np.log(caution[horizon])
        asked, told = (
            np.log(np.maximum(probs[:, i, 1:].max(axis=1), SMALLEST) / probs[:, i, 0])
            for probs in (cloud, edge)
        )
        apart = (told - asked)[np.abs(asked - threshold) < NEAR]
        shift = float(apart.mean() - apart.std()) if apart.size else 0.0
        own.append(round(float(np.exp(threshold + shift)), 6))
    return tuple(own)


def _golden_rows(hazard: Floats32) -> Ints:
    """Return rows from the calmest to the most alarming, half of them among the latter."""
    order = np.argsort(hazard, kind="stable")
    num = min(NUM_GOLDEN // 2, order.size)
    even = np.linspace(0, order.size - 1, num).astype(np.int64)
    return np.unique(np.concatenate([order[even], order[-num:]]))


def _info(
    cloud: Cloud,
    part: Part,
    seen: Floats32,
    columns: list[int],
    hazard: Floats32,
    caution: tuple[float, ...],
) -> BundleInfo:
    """Return what the bundle says of itself, its accuracy not yet measured."""
    decisive = caution[HORIZONS.index(ALERT_HORIZON)]
    threshold = decisive / (1.0 + decisive)  # P(component) > caution * P(no failure)
    share = (hazard[:, :, HORIZONS.index(ALERT_HORIZON)] >= threshold).any(axis=1).mean()
    suspect = float(np.clip(MOST_ALERTS * share, LEAST_SUSPECT, 1.0))
    has_telemetry = not bool(np.isnan(part.fleet.telemetry).all())
    unknown = np.flatnonzero(np.isnan(seen).any(axis=0))
    return BundleInfo(
        version=cloud.number,
        task=FORECAST.name,
        features=tuple(COLUMNS[i] for i in columns),
        variant="both" if has_telemetry else "logs",
        components=tuple(part.fleet.components),
        horizons_h=tuple(float(h) for h in HORIZONS),
        alerts=AlertRule(float(ALERT_HORIZON), round(threshold, 6), round(suspect, 4)),
        accuracy={},
        optional=tuple(COLUMNS[columns[i]] for i in unknown),
        service_period_hours=int(cloud.calibration["service_period_hours"]),
        caution=caution,
    )


def _headline(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return macro F1 of both, and the share of the cloud's events that the edge catches."""
    found: dict[str, float] = {}
    for horizon in map(str, HORIZONS):
        edge, cloud = figures[EDGE][horizon], figures[CLOUD][horizon]
        found[f"macro_f1_{horizon}h"] = edge["macro_f1"]
        found[f"cloud_macro_f1_{horizon}h"] = cloud["macro_f1"]
        if edge["share_of_cloud"] is not None:
            found[f"share_of_cloud_{horizon}h"] = edge["share_of_cloud"]
    return {name: round(value, 4) for name, value in found.items()}


def main(args: argparse.Namespace) -> int:
    """Distil, pack, and say what came of it."""
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - started:5.0f} s] {text}\n")

    fleet = fleet_of(args)[0]
    threads = len(os.sched_getaffinity(0))
    out: Path = args.out
    distil(fleet, args.checkpoint, out, seed=args.seed, threads=threads, say=say)
    info = read_info(out)
    write_whole(out / BUNDLE, pack_edge(out, info.version, fleet))
    size = (out / MODEL).stat().st_size
    sys.stdout.write(json.dumps({"bundle": info.name, "bytes": size, **info.accuracy}) + "\n")
    return 0
