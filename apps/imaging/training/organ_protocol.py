"""The protocol of organ segmentation: OpenKBP's own split, everything trained for as long.

Ours, each kind of its experts alone, and what others would train see the same cases; a tenth
of the training patients is held out of all for temperature and calibration.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.imaging.openkbp import load_patient
from apps.imaging.training.baselines import Kind, label_volume, train_net
from apps.imaging.training.figures import organ_figures
from apps.imaging.training.fit import Recipe, fit_organs, hold_out
from apps.imaging.training.known import Known
from apps.imaging.training.loop import VolumeSettings, infer_labels
from apps.imaging.training.parts import Parts, Say

DATA = "OpenKBP (Babier et al. 2021), {num} training patients; repository licence MIT; research use"
VARIANTS: Mapping[str, tuple[bool, bool]] = {
    "both": (True, True),
    "local": (True, False),
    "global": (False, True),
}
BASELINES: Mapping[str, tuple[Kind, int]] = {
    "unet": ("unet", 1),
    "dynunet": ("dynunet", 1),
    "dynunet_2x": ("dynunet", 2),
}


@dataclass(frozen=True, eq=False)
class OrganProtocol:
    """One run of the organ protocol.

    Args:
        train: Patients to train on.
        test: Patients to report on.
        recipe: Of our model; its seconds are one share of time.
        parts: What was finished before.
        command: That asked for it.
        say: Takes a line of progress.
    """

    train: Sequence[Known]
    test: Sequence[Known]
    recipe: Recipe
    parts: Parts
    command: str
    say: Say

    def ours(self, name: str) -> dict[str, Any]:
        """Return the figures of our model with the experts of a variant."""

        def make() -> Callable[[Known], Any]:
            local, global_ = VARIANTS[name]
            model = fit_organs(
                self.train,
                self.recipe.with_experts(local=local, global_=global_),
                self.parts.folder(name) if local and global_ else None,
                DATA.format(num=len(self.train)),
                self.command,
                lambda line: self.say(f"{name}: {line}"),
            )
            return lambda patient: infer_labels(model, patient.hu)[0]

        return self._figures(name, make)

    def baseline(self, name: str) -> dict[str, Any]:
        """Return the figures of a network that is given some shares of time."""

        def make() -> Callable[[Known], Any]:
            kind, shares = BASELINES[name]
            device = self.recipe.device
            settings = VolumeSettings(
                seconds=shares * self.recipe.seconds, workers=self.recipe.loaders
            )
            seen, _ = hold_out(self.train)
            net = train_net(
                kind, [each.volume for each in seen], settings, device, 0, self._progress(name)
            )
            return lambda patient: label_volume(net, patient.hu, device)

        return self._figures(name, make)

    def _figures(self, name: str, make: Callable[[], Callable[[Known], Any]]) -> dict[str, Any]:
        if (figures := self.parts.load(name)) is not None:
            return figures
        began = time.perf_counter()
        label = make()
        seconds = time.perf_counter() - began
        figures = organ_figures(self.test, [label(patient) for patient in self.test])
        figures["seconds"] = round(seconds, 1)
        self.parts.save(name, figures)
        self.say(f"{name}: Dice {figures['dice_mean']}, {figures['dice']}")
        return figures

    def _progress(self, name: str) -> Callable[[int, int, float], None]:
        began = time.perf_counter()

        def progress(step: int, _steps: int, loss: float) -> None:
            if step % 200 == 0:
                self.say(
                    f"{name}: step {step}, {time.perf_counter() - began:.0f} s, loss {loss:.4f}"
                )

        return progress


def evaluate_organs(
    args: argparse.Namespace, parts: Parts, command: str, say: Say
) -> dict[str, Any]:
    """Return Dice and Hausdorff of ours, its variants, and the baselines at equal time."""
    (data,) = args.data
    paths = [sorted((data / part).glob("pt_*.npz")) for part in ("train", "validation")]
    if not all(paths):
        message = f"{data}: expected train/pt_*.npz and validation/pt_*.npz, found none"
        raise FileNotFoundError(message)
    train, test = (_load(each, args.loaders) for each in paths)
    say(f"{len(train)} patients to train on, {len(test)} to report on")
    recipe = Recipe(args.preset, args.seconds, args.loaders, args.device)
    run = OrganProtocol(train, test, recipe, parts, command, say)
    variants = {name: run.ours(name) for name in VARIANTS}
    baseline = {name: run.baseline(name) for name in BASELINES}
    names = ("dice", "dice_mean", "dice_interval", "hd95", "hd95_mean", "absent")
    return {
        **{name: variants["both"][name] for name in names},
        "variants": variants,
        "baseline": baseline,
        "seconds": args.seconds,
    }


def _load(paths: Sequence[Path], processes: int) -> list[Known]:
    with ProcessPoolExecutor(max(processes, 1)) as pool:
        return list(pool.map(_load_one, paths))


def _load_one(path: Path) -> Known:
    torch.set_num_threads(1)
    return Known.of(*load_patient(path))
