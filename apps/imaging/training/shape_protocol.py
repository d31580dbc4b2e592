"""The protocol of AdrenalMNIST3D: official split, one pass over test for each row.

A row is a file (28 or 64 voxels an edge), with or without averaging over mirror images; the
row that is named best is the best on the validation part.
"""

import argparse
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from apps.imaging.training.adrenal import (
    TASKS,
    ShapeSettings,
    load_split,
    score_shapes,
    train_shapes,
)
from apps.imaging.training.figures import shape_figures
from apps.imaging.training.parts import Parts, Say
from core_model.checkpoint import save_checkpoint
from core_model.config import PRESETS
from core_model.model import MoETransformer

DATA = "AdrenalMNIST3D (MedMNIST v2, Yang et al. 2023), training part; CC BY 4.0"


class Job(NamedTuple):
    """One training.

    Args:
        path: AdrenalMNIST3D, either size.
        seed: Of weights, order and variation.
        preset: Sizes of the shared blocks.
        device: Where.
        weights: Where they are kept, if they are.
        command: That asked for it.
    """

    path: Path
    seed: int
    preset: str
    device: str
    weights: Path | None
    command: str


def evaluate_adrenal(
    args: argparse.Namespace, parts: Parts, command: str, say: Say
) -> dict[str, Any]:
    """Return the figures of every row, and those of the best on the validation part."""
    jobs: dict[str, Job] = {}
    for number, (path, seed) in enumerate((p, s) for p in args.data for s in range(args.seeds)):
        name = f"{path.stem}-{seed}"
        device = args.device
        if device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
        jobs[name] = Job(path, seed, args.preset, device, parts.folder(name), command)
    seeds: dict[tuple[int, bool], list[dict[str, float]]] = {}
    found = {name: figures for name in jobs if (figures := parts.load(name)) is not None}
    for name, figures in _run(args.loaders, {n: j for n, j in jobs.items() if n not in found}):
        parts.save(name, figures)
        found[name] = figures
        say(f"{name}: {figures['flips']}")
    for name in jobs:
        for flips in (False, True):
            row = found[name]["flips" if flips else "single"]
            seeds.setdefault((found[name]["size"], flips), []).append(row)
    rows = [_summary(size, each, flips=flips) for (size, flips), each in seeds.items()]
    best = max(rows, key=lambda row: row["val_auc_mean"])
    keys = ("auc_mean", "auc_std", "acc_mean", "acc_std", "sensitivity", "specificity")
    return {
        **{key: best[key] for key in keys},
        "chosen": {k: best[k] for k in ("size", "flips")},
        "seeds": list(range(args.seeds)),
        "rows": rows,
    }


def _run(processes: int, jobs: Mapping[str, Job]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the figures of trainings as they end, several at once if asked."""
    if processes < 2:
        yield from ((name, train_seed(job)) for name, job in jobs.items())
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        running = {pool.submit(train_seed, job): name for name, job in jobs.items()}
        for done in as_completed(running):
            yield running[done], done.result()


def train_seed(job: Job) -> dict[str, Any]:
    """Train once; return the figures of test with and without mirror images."""
    torch.set_float32_matmul_precision("high")
    parts = {part: load_split(job.path, part) for part in ("train", "val", "test")}
    on = {part: [each.to(job.device) for each in pair] for part, pair in parts.items()}
    size = on["train"][0].shape[1]
    torch.manual_seed(job.seed)
    model = MoETransformer(PRESETS[job.preset], [TASKS[size]]).to(job.device)
    masks, classes = on["train"]
    train_shapes(model, masks, classes, ShapeSettings(), job.seed, lambda *_: None)
    truth = {part: parts[part][1].numpy() for part in ("val", "test")}
    figures: dict[str, Any] = {"size": size}
    for name, flips in (("single", False), ("flips", True)):
        scores = {
            part: score_shapes(model, on[part][0], flips=flips).cpu().numpy()
            for part in ("val", "test")
        }
        figures[name] = shape_figures(scores, truth)
    if job.weights:
        save_checkpoint(
            job.weights,
            model,
            version=f"{TASKS[size]}-{job.seed}",
            data=DATA,
            metrics={key: round(value, 4) for key, value in figures["flips"].items()},
            command=job.command,
        )
    return figures


def _summary(size: int, seeds: Sequence[Mapping[str, float]], *, flips: bool) -> dict[str, Any]:
    names = seeds[0].keys()
    mean = {name: float(np.mean([row[name] for row in seeds])) for name in names}
    spread = {name: float(np.std([row[name] for row in seeds])) for name in ("auc", "acc")}
    return {
        "size": size,
        "flips": flips,
        **{f"{name}_mean": round(mean[name], 4) for name in ("auc", "acc", "val_auc")},
        **{f"{name}_std": round(value, 4) for name, value in spread.items()},
        **{
            name: round(mean[name], 4)
            for name in ("sensitivity", "specificity", "balanced_acc", "majority")
        },
        "per_seed": [dict(row) for row in seeds],
    }
