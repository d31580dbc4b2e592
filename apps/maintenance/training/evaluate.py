"""``trimoe maintenance evaluate``: the public protocols, ours beside LightGBM in one run."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from apps.maintenance.azure import load_fleet
from apps.maintenance.splits import parts
from apps.maintenance.training import (
    azure_report,
    azure_runs,
    baseline,
    cmapss_report,
    cmapss_runs,
    fit,
    life_fit,
    trees,
)
from apps.maintenance.training.azure_report import PartReport
from apps.maintenance.training.azure_runs import Runs
from apps.maintenance.training.cmapss_runs import LifeRuns


def evaluate_azure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of all three inputs, and of degraded ones."""
    fleet = load_fleet(args.data)
    facts = [fit.SETTINGS, fit.LEAST_STEPS, azure_runs.MOST_FAR_ROWS, azure_runs.DEGRADED_SHARE]
    facts += [trees.PARAMETERS, trees.NUM_ROUNDS, baseline.PARAMETERS, args.preset]
    folder = work_folder(args, facts)
    figures: dict[str, Any] = {}
    degraded: dict[str, Any] = {}
    for part in parts(fleet):
        runs = Runs(part, folder, args.device, args.preset, args.threads, say)
        runs.run_baseline(range(args.seeds))
        runs.run_ours(range(args.seeds))
        report = PartReport(runs, args.seeds)
        figures[part.name] = report.figures()
        print(azure_report.as_text(part.name, figures[part.name]))
        if runs.has_telemetry:
            degraded[part.name] = report.degraded()
            print(azure_report.degraded_as_text(part.name, degraded[part.name]))
    return {**figures, "degraded": degraded}


def evaluate_cmapss(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of one subset."""
    facts = [life_fit.SETTINGS, cmapss_runs.MOST_ROWS, life_fit.FADE_CYCLES, args.preset]
    facts += [life_fit.TREES, life_fit.NUM_ROUNDS, cmapss_runs.RECIPE, str(args.data)]
    folder = work_folder(args, facts)
    runs = LifeRuns(args.data, args.subset, folder, args.device, args.preset, args.threads, say)
    runs.run(range(args.seeds))
    figures = cmapss_report.life_figures(runs, args.seeds)
    print(cmapss_report.as_text(figures))
    return figures


EVALUATIONS = {"azure": evaluate_azure, "cmapss": evaluate_cmapss}


def work_folder(args: argparse.Namespace, facts: list[Any]) -> Path:
    """Return the folder of these settings; another setting, another folder."""
    digest = hashlib.sha256(repr([*facts, args.device]).encode()).hexdigest()[:12]
    work = args.work or Path(gettempdir()) / "trimoe-maintenance-evaluate"
    folder: Path = work / f"{args.dataset}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(args: argparse.Namespace) -> int:
    """Run the protocol; print and store the figures."""
    started = time.monotonic()
    args.threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)  # small products gain nothing from more

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", file=sys.stderr)

    figures = EVALUATIONS[args.dataset](args, say)
    figures |= {"seconds": round(time.monotonic() - started, 1), "device": args.device}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0
