"""The loop, closed: drift at the boxes, a trigger, a Ray job, a signed edge model, back on the boxes.

    python -m benchmarks.edge_loop --json FILE

A generated fleet whose sensors, from a day on, stand elsewhere and answer wear the other way
round.  Boxes (the real agents, over HTTP to the real sync server) forecast day by day; the plant
looks at its triggers every few days as ``trimoe sync retrain`` does, on its own record; what
follows is signed with real keys and rolled out by stages, with an operator's approval.

The metric is macro F1 of what boxes uploaded: the component with the largest hazard at 48 h where
it reaches the alert rule of the bundle, none elsewhere.  Minutes are those from the look that
found the trigger to the last box on the new version.

Printed last: one JSON object; a row is appended to benchmarks/results.

Legend: N windows, C components, H horizons.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.edge.bundle import INFO, BundleInfo, unpack, write_bundle
from apps.maintenance.edge.forecast import Forecaster
from apps.maintenance.fleet import Fleet, Ints
from apps.maintenance.protocol import Rows, hours_to_failure, labels, macro_f1
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.evidence import HOUR_S, start_of
from apps.maintenance.sync.keys import make_keys
from apps.maintenance.sync.policy import Plan
from apps.maintenance.sync.publishing import publish_bundle
from apps.maintenance.sync.retrainings import State
from apps.maintenance.sync.service import NUM_KEYS
from apps.maintenance.sync.shadow import run_shadow
from apps.maintenance.tables import write_fleet
from apps.maintenance.training.azure_runs import Runs
from apps.maintenance.training.distill import distil
from apps.maintenance.training.fit import Fit
from apps.maintenance.training.retrain import Retrainer
from apps.maintenance.training.retrain_record import (
    MAX_WINDOWS,
    Span,
    cut,
    held_out,
    pack_edge,
)
from apps.maintenance.training.train import (
    carry_trees,
    chosen_by,
    fit_weights,
    training_part,
    write_chosen,
)
from benchmarks.edge_plant import (
    GROUP,
    NUM_BOXES,
    Days,
    FleetClock,
    Play,
    drifting_fleet,
    say,
)
from benchmarks.edge_rig import SignedFolder, sync_server
from benchmarks.results import append_row
from core_model.checkpoint import save_checkpoint

LOOK_DAYS = 4  # between two looks at the triggers
METRIC_H = 48
LAG_H = 72  # after a change, before its windows hold nothing of the time before


def first_model(fleet: Fleet, out: Path, preset: str, threads: int) -> None:
    """Train the model that is deployed before the drift."""
    work = out.with_name("first")
    work.mkdir(parents=True)
    runs = Runs(training_part(fleet), work, "cpu", preset, threads, say)
    model, booster = fit_weights(runs, Fit(0, "cpu", preset, threads))
    carry_trees(model, booster)
    save_checkpoint(
        out, model, version="forecast-1", data="generated", metrics={}, command="edge_loop"
    )
    write_chosen(out, chosen_by(runs, runs.calibration()))


def score(fleet: Fleet, rows: Rows, hazard: NDArray[np.floating[Any]], info: BundleInfo) -> float:
    """Return macro F1 of the components that are alerted at ``METRIC_H``."""
    horizon_idx = info.horizons_h.index(METRIC_H)
    at = hazard[:, :, horizon_idx]
    decided: Ints = np.where(at.max(axis=1) >= info.alerts.threshold, at.argmax(axis=1) + 1, 0)
    truth = labels(hours_to_failure(fleet.failures, rows, len(fleet.components)), METRIC_H)
    return macro_f1(truth, decided.astype(np.int64), 1 + len(fleet.components))


def figures(play: Play, bundles: Mapping[str, bytes], days: Days, switched: int) -> dict[str, Any]:
    """Return the metric before the drift, after it with the old model, and with the new one.

    Args:
        play: That is over.
        bundles: Old and new.
        days: Of the play.
        switched: Hour at which the last box had switched.
    """
    rows, hazard, versions = play.uploaded()
    version = np.array(versions)
    info = {name: BundleInfo.from_json(unpack(each)[INFO]) for name, each in bundles.items()}
    drift, end = days.drift * 24, play.hour - METRIC_H

    def part(first: int, last: int, name: str) -> NDArray[np.bool_]:
        inside = (rows.hour >= first) & (rows.hour < last)
        return np.asarray(inside & (version == info[name].name))

    before = part(days.train * 24 + LAG_H, drift - METRIC_H, "old")
    drifted = part(drift + LAG_H, switched, "old")
    new = part(switched, end, "new")
    with tempfile.TemporaryDirectory() as name:
        write_bundle(Path(name), bundles["old"])
        features = play.features(rows.take(new), info["old"].features)
        forecaster = Forecaster(Path(name))
        parts = np.array_split(features, -(-len(features) // MAX_WINDOWS))
        asked = np.concatenate([forecaster.forecast(each).hazard for each in parts])
    fleet = play.fleet
    found = {
        "before": score(fleet, rows.take(before), hazard[before], info["old"]),
        "after_old": score(fleet, rows.take(drifted), hazard[drifted], info["old"]),
        "after_old_same_windows": score(fleet, rows.take(new), asked, info["old"]),
        "after_new": score(fleet, rows.take(new), hazard[new], info["new"]),
    }
    lost = found["before"] - found["after_old_same_windows"]
    back = found["after_new"] - found["after_old_same_windows"]
    return {
        "metric": f"macro_f1_{METRIC_H}h",
        **{key: round(value, 4) for key, value in found.items()},
        "regained": round(back / lost, 4),
        "windows": {"before": int(before.sum()), "old": int(drifted.sum()), "new": int(new.sum())},
    }


def play_loop(folder: Path, num_machines: int, preset: str, seed: int) -> dict[str, Any]:
    """Play the whole course; return what was seen."""
    days, threads = Days(), len(os.sched_getaffinity(0))
    fleet = drifting_fleet(num_machines, days, seed)
    keys = {role: make_keys(folder / "keys", {role: num}) for role, num in NUM_KEYS.items()}
    signed = SignedFolder(folder / "repository", keys)
    first = cut(fleet, Span(0, days.train * 24))
    first_model(first, folder / "forecast-1", preset, threads)
    distil(first, folder / "forecast-1", folder / "edge-1", seed=0, threads=threads, say=say)
    old = pack_edge(folder / "edge-1", 1, first)
    clock = FleetClock(fleet, days.train * 24)
    with Control(folder, clock) as control, sync_server(control, signed.folder) as url:
        play = Play(folder, fleet, clock, control, signed, url)
        offer = publish_bundle(signed.repository, old)
        play.begin(offer, run_shadow(old, held_out(training_part(first), METRIC_H)))
        retrainer = Retrainer(
            control,
            GROUP,
            folder / "record",
            folder / "forecast-1",
            [folder / "keys"],
            Plan(shares=(1 / NUM_BOXES, 1.0)),
            threads,
        )
        retraining, began = None, 0.0
        while retraining is None and play.hour < days.latest * 24:
            play.turn()
            if play.hour // 24 % LOOK_DAYS == 0:
                write_fleet(cut(fleet, Span(0, play.hour)), folder / "record")
                began = time.perf_counter()
                retraining = retrainer.attend()
                say(f"day {play.hour // 24}: {told(control)}")
        if retraining is None or retraining.state is not State.ROLLED_OUT:
            raise SystemExit(f"expected a rollout by day {days.latest}, got {retraining}")
        job_minutes = (time.perf_counter() - began) / 60
        trained_day = play.hour // 24
        play.settle(retraining.rollout)
        minutes = (time.perf_counter() - began) / 60
        switched = play.hour
        versions = [agent.slots.pointer.version for agent in play.agents]
        say(f"boxes on {versions}")
        for _ in range(days.after):
            play.turn()
        play.close()
        bundle = (control.retraining / str(retraining.number) / "bundle.tar").read_bytes()
        report = figures(play, {"old": old, "new": bundle}, days, switched)
        return {
            **report,
            "minutes": round(minutes, 2),
            "job_minutes": round(job_minutes, 2),
            "drift_day": days.drift,
            "raised_day": raised_day(control, fleet),
            "retrained_day": trained_day,
            "reasons": list(retraining.reasons),
            "versions": versions,
            "machines": num_machines,
            "boxes": NUM_BOXES,
            "preset": preset,
            "bundle_bytes": len(bundle),
            "audit_end": control.verify_audit()[:16],
        }


def told(control: Control) -> str:
    """Return the triggers in one line."""
    parts = [
        f"{each.trigger} {each.value}{'!' if each.is_active else ''} ({each.detail})"
        for each in control.retrainings.triggers()
    ]
    return "; ".join(parts)


def raised_day(control: Control, fleet: Fleet) -> float:
    """Return the day on which drift was raised first."""
    for entry in control.audit(10**6):
        if entry.action == "raise trigger" and json.loads(entry.detail)["trigger"] == "drift":
            return round((entry.time - start_of(fleet)) / HOUR_S / 24, 1)
    return -1.0


def main() -> int:
    """Play, append a row, and print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--machines", type=int, default=90)
    parser.add_argument("--preset", default="tiny", help="sizes of the core")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        report = play_loop(Path(folder), args.machines, args.preset, args.seed)
    append_row(args.results, "edge_loop", {**report, "windows": json.dumps(report["windows"])})
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    return 0 if report["regained"] >= 0.95 and report["minutes"] <= 30 else 1


if __name__ == "__main__":
    sys.exit(main())
