"""``trimoe imaging evaluate``: the two public protocols, beside what others would train.

Everything is chosen on training and validation parts; each test part is read once per row.

Legend: n volumes, Z Y X voxels of the grid, K J I of the slices.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from apps.imaging.openkbp import load_patient
from apps.imaging.segmentation import ORGANS
from apps.imaging.training.adrenal import (
    TASKS,
    ShapeSettings,
    load_split,
    score_shapes,
    train_shapes,
)
from apps.imaging.training.baselines import Kind, label_volume, train_net
from apps.imaging.training.known import Known
from apps.imaging.training.loop import TASK, Volume, VolumeSettings, infer_labels, train_volumes
from core_model.config import PRESETS
from core_model.model import MoETransformer

if TYPE_CHECKING:
    from core_model.volume import VolumeAdapter

Say = Callable[[str], None]
VARIANTS: Mapping[str, tuple[bool, bool]] = {
    "both": (True, True),
    "local": (True, False),
    "global": (False, True),
}
BOOTSTRAP = 2000


def main(args: argparse.Namespace) -> int:
    """Run one protocol and print its figures as one JSON line."""
    torch.set_float32_matmul_precision("high")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report = evaluate_organs(args, say) if args.task == "organs" else evaluate_adrenal(args, say)
    line = json.dumps(report)
    print(line)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0


def evaluate_adrenal(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Return the figures of AdrenalMNIST3D: one row per file, and with mirror images or not."""
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for path in args.data:
        parts = {part: load_split(path, part) for part in ("train", "val", "test")}
        on = {part: [each.to(args.device) for each in pair] for part, pair in parts.items()}
        size = on["train"][0].shape[1]
        for seed in range(args.seeds):
            model = _train_adrenal(on["train"], size, seed, args, say)
            for flips in (False, True):
                scores = {
                    part: score_shapes(model, on[part][0], flips=flips).cpu().numpy()
                    for part in ("val", "test")
                }
                truth = {part: parts[part][1].numpy() for part in ("val", "test")}
                row = shape_figures(scores, truth)
                found.setdefault((str(size), flips), []).append(row)
                say(f"{size} flips={flips} seed {seed}: " + json.dumps(row))
    rows = [_summary(int(size), seeds, flips=flips) for (size, flips), seeds in found.items()]
    best = max(rows, key=lambda row: row["val_auc_mean"])
    keys = ("auc_mean", "auc_std", "acc_mean", "acc_std", "sensitivity", "specificity")
    return {
        **{key: best[key] for key in keys},
        "chosen": {k: best[k] for k in ("size", "flips")},
        "seeds": list(range(args.seeds)),
        "rows": rows,
    }


def _train_adrenal(
    part: Sequence[torch.Tensor], size: int, seed: int, args: argparse.Namespace, say: Say
) -> MoETransformer:
    torch.manual_seed(seed)
    model = MoETransformer(PRESETS[args.preset], [TASKS[size]]).to(args.device)

    def progress(epoch: int, epochs: int, loss: float) -> None:
        if epoch % 5 == 0:
            say(f"{size} seed {seed}: epoch {epoch} of {epochs}, loss {loss:.4f}")

    train_shapes(model, part[0], part[1], ShapeSettings(), seed, progress)
    return model


def shape_figures(
    scores: Mapping[str, NDArray[np.float32]], truth: Mapping[str, NDArray[np.float32]]
) -> dict[str, float]:
    """Return AUC and, at a probability of one half, the figures of a threshold."""
    said = scores["test"] > 0
    positive = truth["test"] > 0.5
    return {
        "val_auc": float(roc_auc_score(truth["val"], scores["val"])),
        "auc": float(roc_auc_score(truth["test"], scores["test"])),
        "acc": float((said == positive).mean()),
        "balanced_acc": float(balanced_accuracy_score(positive, said)),
        "sensitivity": float(said[positive].mean()),
        "specificity": float((~said)[~positive].mean()),
        "majority": float(max(positive.mean(), 1 - positive.mean())),
    }


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


@dataclass(frozen=True, eq=False)
class OrganProtocol:
    """One run of the organ protocol: everything is trained on the same volumes for as long.

    Args:
        volumes: Of the training patients.
        test: Patients to report on.
        settings: Of the training; its seconds are one share of time.
        device: Where.
        preset: Sizes of the shared blocks.
        say: Takes a line of progress.
    """

    volumes: Sequence[Volume]
    test: Sequence[Known]
    settings: VolumeSettings
    device: str
    preset: str
    say: Say

    def ours(self, name: str, *, local: bool, global_: bool) -> dict[str, Any]:
        """Return the figures of our model with the experts that are named."""
        torch.manual_seed(0)
        model = MoETransformer(PRESETS[self.preset], [TASK]).to(self.device)
        cast("VolumeAdapter", model.adapters[TASK]).use_experts(local=local, global_=global_)
        train_volumes(model, self.volumes, self.settings, 0, self._progress(name))
        return self._figures(name, [infer_labels(model, each.hu)[0] for each in self.test])

    def baseline(self, name: str, kind: Kind, shares: int) -> dict[str, Any]:
        """Return the figures of a network that is given some shares of time."""
        settings = replace(self.settings, seconds=shares * self.settings.seconds)
        net = train_net(kind, self.volumes, settings, self.device, 0, self._progress(name))
        return self._figures(name, [label_volume(net, each.hu, self.device) for each in self.test])

    def _figures(self, name: str, labelled: Sequence[NDArray[np.uint8]]) -> dict[str, Any]:
        figures = organ_figures(self.test, labelled)
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


def evaluate_organs(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Return Dice and Hausdorff of ours, its variants, and the baselines at equal time."""
    (data,) = args.data
    train = [Known.of(*load_patient(path)) for path in sorted((data / "train").glob("pt_*.npz"))]
    test = [
        Known.of(*load_patient(path)) for path in sorted((data / "validation").glob("pt_*.npz"))
    ]
    if not train or not test:
        message = f"{data}: expected train/pt_*.npz and validation/pt_*.npz, found none"
        raise FileNotFoundError(message)
    say(f"{len(train)} patients to train on, {len(test)} to report on")
    settings = VolumeSettings(steps=10**9, seconds=args.seconds, workers=args.loaders)
    volumes = [patient.volume for patient in train]
    run = OrganProtocol(volumes, test, settings, args.device, args.preset, say)
    variants = {
        name: run.ours(name, local=local, global_=global_)
        for name, (local, global_) in VARIANTS.items()
    }
    baseline = {
        "unet": run.baseline("unet", "unet", 1),
        "dynunet": run.baseline("dynunet", "dynunet", 1),
        "dynunet_2x": run.baseline("dynunet_2x", "dynunet", 2),
    }
    names = ("dice", "dice_mean", "dice_interval", "hd95", "hd95_mean", "absent")
    return {
        **{name: variants["both"][name] for name in names},
        "variants": variants,
        "baseline": baseline,
        "seconds": args.seconds,
    }


def organ_figures(
    patients: Sequence[Known], labelled: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Return Dice in native voxels and 95 % Hausdorff distance in mm, organs then patients.

    Absent organs are left out and counted; the interval is a bootstrap over patients.
    """
    dice = np.full((len(patients), len(ORGANS)), np.nan)
    far = np.full_like(dice, np.nan)
    for i, (patient, labels) in enumerate(zip(patients, labelled, strict=True)):
        said = patient.grid.spread(labels)
        step = float(np.median(np.diff(patient.grid.stack.positions_mm)))
        spacing = (step, *patient.grid.stack.pixel_mm)
        for organ in range(len(ORGANS)):
            truth, own = patient.truth == organ + 1, said == organ + 1
            if not truth.any():
                continue
            dice[i, organ] = 2.0 * (truth & own).sum() / (truth.sum() + own.sum())
            far[i, organ] = hausdorff95(own, truth, spacing)
    per_patient = np.nanmean(dice, axis=1)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(patients), (BOOTSTRAP, len(patients)))
    low, high = np.quantile(per_patient[draws].mean(axis=1), [0.025, 0.975])
    return {
        "dice": {name: _rounded(dice[:, i]) for i, name in enumerate(ORGANS)},
        "dice_mean": round(float(per_patient.mean()), 4),
        "dice_interval": [round(float(low), 4), round(float(high), 4)],
        "hd95": {name: _rounded(far[:, i]) for i, name in enumerate(ORGANS)},
        "hd95_mean": round(float(np.nanmean(np.nanmean(far, axis=1))), 2),
        "absent": {name: int(np.isnan(dice[:, i]).sum()) for i, name in enumerate(ORGANS)},
    }


def _rounded(values: NDArray[np.float64]) -> float | None:
    """Return the mean over the patients that have the organ, None if none has."""
    return None if np.isnan(values).all() else round(float(np.nanmean(values)), 4)


def hausdorff95(
    own: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: tuple[float, ...]
) -> float:
    """Return the 95 % Hausdorff distance in mm; the diagonal of the truth's box if none is found."""
    box = np.argwhere(own | truth)
    low, high = box.min(axis=0), box.max(axis=0) + 1
    if not own.any():
        return float(np.linalg.norm((high - low) * np.array(spacing)))
    at = tuple(slice(max(a - 1, 0), b + 1) for a, b in zip(low, high, strict=True))
    said, wanted = (
        torch.from_numpy(each[at][None, None].astype(np.uint8)) for each in (own, truth)
    )
    found = compute_hausdorff_distance(
        said, wanted, percentile=95, spacing=list(spacing), include_background=True
    )
    return float(found.item())
