"""``trimoe bench model``: what sharing one core costs each application, and what each part is worth.

--shared-vs-separate   one core for all against one core each, a dense core, and cores
                       without the applications' special experts; how evenly experts work
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apps.joint import Plan, lean_lessons, lessons_of, work_of
from benchmarks.experts_figure import draw_shares
from benchmarks.model_layer import run_layer
from benchmarks.model_parts import Figures, Lessons, parts_of, run_parts
from benchmarks.results import RESULTS, append_row
from core_model.config import PRESETS
from core_model.joint import LoopSettings
from core_model.size import count_parameters


def main(args: argparse.Namespace) -> int:
    """Run what was asked for."""
    return run_layer(args) if args.layer else run_trainings(args)


def run_trainings(args: argparse.Namespace) -> int:
    """Run the trainings, print the tables, append a row."""
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - started:5.0f} s] {text}\n")

    whole = lessons_of(args, say)
    lessons = Lessons(whole, lean_lessons(whole))
    plan = Plan(PRESETS[args.preset], LoopSettings(args.steps), 0, args.device)
    work = work_of(args) / f"parts-{args.preset}-{args.steps}-{args.device}"
    work.mkdir(exist_ok=True)
    found = run_parts(parts_of(lessons, plan, args.seeds), lessons, args.jobs, work, say)
    figures = summary(found, [each.task for each in whole], args.seeds)
    figures["stack"] = {
        "shared": count_parameters(plan.config).total,
        "separate": count_parameters(plan.config).total * len(whole),
    }
    sys.stdout.write(as_text(figures))
    if args.figure:
        shares = {t: np.array(s) for t, s in figures["balance"]["shared"]["shares"].items()}
        args.figure.write_text(draw_shares(shares), encoding="utf-8")
    row = {
        "device": args.device,
        "preset": args.preset,
        "steps": args.steps,
        "seeds": args.seeds,
        **{
            f"{name}_{metric}": value["mean"]
            for name, metrics in figures["metrics"].items()
            for metric, value in metrics.items()
        },
        "utilisation": figures["balance"]["shared"]["mean"],
        "utilisation_worst": figures["balance"]["shared"]["worst_layer"],
        "seconds": round(time.monotonic() - started, 1),
    }
    append_row(args.results or RESULTS, "model", row)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(row) + "\n")
    return 0


def summary(found: Mapping[str, Figures], tasks: Sequence[str], seeds: int) -> dict[str, Any]:
    """Return mean and deviation of each metric by model, and the balance of each way."""
    names = dict.fromkeys(key.rpartition("-")[0] for key in found)
    singles = {"shared", "dense"} | {name for name in names if name.startswith("lean-")}
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for name in singles:
        metrics[name] = _averaged([found[f"{name}-{s}"]["metrics"] for s in range(seeds)])
    alone = [
        {task: found[f"separate-{task}-{s}"]["metrics"][task] for task in tasks}
        for s in range(seeds)
    ]
    metrics["separate"] = _averaged(alone)
    order = ["shared", "separate", "dense", *sorted(singles - {"shared", "dense"})]
    balance = {name: found[f"{name}-0"]["balance"] for name in ("shared", "loss", "unbalanced")}
    return {"metrics": {name: metrics[name] for name in order}, "balance": balance}


def _averaged(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    found = {}
    for task, metrics in runs[0].items():
        for metric in metrics:
            values = [run[task][metric] for run in runs]
            found[f"{task}_{metric}"] = {
                "mean": float(np.mean(values)),
                "std": float(np.std(values)),
            }
    return found


def as_text(figures: Mapping[str, Any]) -> str:
    """Return the tables."""
    metrics = figures["metrics"]
    lines = [f"{'':28}" + "".join(f"{name:>16}" for name in metrics) + "   shared/separate"]
    for metric, shared in metrics["shared"].items():
        cells = "".join(f"{each[metric]['mean']:16.4f}" for each in metrics.values())
        ratio = shared["mean"] / metrics["separate"][metric]["mean"]
        lines.append(f"{metric:28}{cells}   {ratio:.4f}")
    stack = figures["stack"]
    lines.append(f"block stack: {stack['shared']:,} parameters shared, {stack['separate']:,} apart")
    for name, each in figures["balance"].items():
        lines.append(
            f"{name:12} utilisation {each['mean']:.3f}, worst layer {each['worst_layer']:.3f}; "
            f"steps {each['step']['mean']:.3f}, routed at random {each['step_of_random_routing']:.3f}"
        )
        lines += [
            f"  {task:12} {own['mean']:.3f}, worst layer {own['worst_layer']:.3f}, {own['dead']} dead"
            for task, own in each["by_task"].items()
        ]
    return "\n".join(lines) + "\n"
