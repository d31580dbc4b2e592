"""``trimoe imaging train``: weights of the organ task with their calibration.

A tenth of the cases is held out: temperature, thresholds and the profile of ordinary cases
come from those, and the figures in the manifest.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from apps.imaging.calibration import FILE
from apps.imaging.openkbp import load_patient
from apps.imaging.phantom import PhantomShape, make_phantom
from apps.imaging.segmentation import ORGANS
from apps.imaging.training.calibrate import fit_calibration, fit_temperature
from apps.imaging.training.known import Known
from apps.imaging.training.loop import TASK, VolumeSettings, organ_adapter, train_volumes
from apps.imaging.training.parts import Say
from core_model.checkpoint import save_checkpoint
from core_model.config import PRESETS
from core_model.model import MoETransformer

HELD_SHARE = 0.1
PHANTOM_SIZES = ((80, 112), (96, 128), (120, 160))  # slices, pixels an edge


@dataclass(frozen=True, slots=True)
class Recipe:
    """How our organ model is trained.

    Args:
        preset: Sizes of the shared blocks.
        seconds: Of training.
        loaders: Processes that cut windows.
        device: Where.
        local: Whether the local experts take part.
        global_: Whether the global ones do.
    """

    preset: str
    seconds: float
    loaders: int
    device: str
    local: bool = True
    global_: bool = True

    def with_experts(self, *, local: bool, global_: bool) -> Self:
        """Return the same with other experts."""
        return replace(self, local=local, global_=global_)


def main(args: argparse.Namespace) -> int:
    """Train, calibrate and save."""
    cases = make_cases(args.phantoms) if args.phantoms else read_cases(args.data)
    recipe = Recipe(args.preset, args.seconds, args.loaders, args.device)
    command = "trimoe " + shlex.join(sys.argv[1:])
    fit_organs(cases, recipe, args.out, _data_of(args, len(cases)), command, _say)
    return 0


def hold_out(cases: Sequence[Known]) -> tuple[list[Known], list[Known]]:
    """Return the cases to train on, and those that temperature and thresholds come from."""
    order = np.random.default_rng(0).permutation(len(cases))
    num_held = max(round(HELD_SHARE * len(cases)), 1)
    return [cases[i] for i in order[num_held:]], [cases[i] for i in order[:num_held]]


def fit_organs(
    cases: Sequence[Known], recipe: Recipe, out: Path | None, data: str, command: str, say: Say
) -> MoETransformer:
    """Return a model trained and calibrated on the cases, saved if there is a place for it."""
    seen, held = hold_out(cases)
    say(f"{len(seen)} cases to train on, {len(held)} held out")
    torch.manual_seed(0)
    model = MoETransformer(PRESETS[recipe.preset], [TASK]).to(recipe.device)
    organ_adapter(model).use_experts(local=recipe.local, global_=recipe.global_)
    settings = VolumeSettings(seconds=recipe.seconds, workers=recipe.loaders)
    began = time.perf_counter()

    def progress(step: int, _steps: int, loss: float) -> None:
        if step % 100 == 0:
            say(f"step {step}, {time.perf_counter() - began:.0f} s, loss {loss:.4f}")

    train_volumes(model, [case.volume for case in seen], settings, 0, progress)
    if out:
        temperature = fit_temperature(model, held)
        calibration, dice = fit_calibration(model, seen, held)
        metrics = {name: round(value, 4) for name, value in dice_metrics(dice).items()}
        metrics["temperature"] = round(temperature, 3)
        save_checkpoint(
            out, model, version="imaging-1", data=data, metrics=metrics, command=command
        )
        calibration.save(out / FILE)
        say(f"Dice of held-out cases {metrics}")
    return model


def dice_metrics(dice: NDArray[np.float64]) -> dict[str, float]:
    """Return the mean Dice of each organ that is contoured, and of the cases [cases, organs]."""
    found = {
        f"dice_{name}": float(np.nanmean(dice[:, i]))
        for i, name in enumerate(ORGANS)
        if not np.isnan(dice[:, i]).all()
    }
    return {**found, "dice_mean": float(np.nanmean(np.nanmean(dice, axis=1)))}


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def make_cases(num: int) -> list[Known]:
    """Return generated phantoms of several sizes."""
    found = []
    for seed in range(num):
        slices, pixels = PHANTOM_SIZES[seed % len(PHANTOM_SIZES)]
        shape = PhantomShape(slices, pixels, 280.0 / slices, 410.0 / pixels, 10.0 + seed % 20)
        stack, labels = make_phantom(seed, shape)
        found.append(Known.of(stack, labels))
    return found


def read_cases(folder: Path) -> list[Known]:
    """Return the OpenKBP patients of a folder.

    Raises:
        FileNotFoundError: It holds fewer than two.
    """
    paths = sorted(folder.glob("pt_*.npz"))
    if len(paths) < 2:
        message = f"{folder}: expected two files pt_*.npz or more, got {len(paths)}"
        raise FileNotFoundError(message)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_read_case, paths))


def _read_case(path: Path) -> Known:
    return Known.of(*load_patient(path))


def _data_of(args: argparse.Namespace, num: int) -> str:
    if args.phantoms:
        return f"{num} generated phantoms (apps/imaging/phantom.py); research use"
    return f"{num} labelled CT volumes of your own folder"
