"""``trimoe models level``: the experts of a checkpoint, loaded evenly by traffic as it is now.

Solves the selection biases of each task on its traffic (``core_model.balance.rebalance``); what is
trained stays as it is.  Which of two near experts is chosen moves a little, so what is calibrated is
calibrated and what is measured is measured anew.  A task without traffic keeps its biases.
"""

import argparse
import shutil
import sys
import time
from typing import Any

from apps.joint import Lesson, command_line, encoded_traffic, finish, lessons_of, write_figures
from core_model.balance import measure_utilisation, rebalance
from core_model.checkpoint import load_checkpoint, save_checkpoint
from core_model.model import MoETransformer
from core_model.training import device_of


def main(args: argparse.Namespace) -> int:
    """Level a checkpoint's experts, report on held-out data, save it."""
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - started:5.0f} s] {text}\n")

    model, manifest = load_checkpoint(args.checkpoint, device=args.device)
    lessons = [each for each in lessons_of(args, say) if each.task in manifest.tasks]
    if args.out.resolve() != args.checkpoint.resolve():
        shutil.copytree(args.checkpoint, args.out, dirs_exist_ok=True)
    metrics: dict[str, float] = dict(manifest.metrics)
    levels: dict[str, Any] = {}
    for each in lessons:
        before = level_of(model, each)
        rebalance(model, each.task, list(encoded_traffic(model, each)))
        levels[each.task] = {"before": before, "after": level_of(model, each)}
        metrics |= finish(each, model, args.out)
        say(f"{each.task}: utilisation {levels[each.task]}")
    saved = save_checkpoint(
        args.out,
        model.cpu(),
        version=args.version or manifest.version,
        data=manifest.data,
        metrics=metrics,
        command=f"{manifest.command}; {command_line()}",
    )
    write_figures({"version": saved.version, "utilisation": levels, **metrics}, args.json)
    return 0


def level_of(model: MoETransformer, lesson: Lesson) -> list[float]:
    """Return mean load / max load of each layer's experts on held-out sequences."""
    level = measure_utilisation(model, lesson.task, lesson.held_out(device_of(model)))
    return [round(each, 4) for each in level.tolist()]
