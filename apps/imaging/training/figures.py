"""What is reported of a method: Dice and Hausdorff of organs, AUC and accuracy of shapes.

Legend: n volumes, K J I of the slices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from apps.imaging.segmentation import ORGANS
from apps.imaging.training.known import Known

BOOTSTRAP = 2000


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
    from monai.metrics.hausdorff_distance import (  # noqa: PLC0415 - training needs no MONAI
        compute_hausdorff_distance,
    )

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
