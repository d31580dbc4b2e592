"""What held-out cases teach of a trained organ model: when to believe it, and what is unusual.

Legend: n windows, L labels, Z Y X voxels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from apps.imaging.calibration import Calibration, case_confidence, profile
from apps.imaging.segmentation import ORGANS
from apps.imaging.training.known import Known
from apps.imaging.training.loop import (
    TASK,
    collate,
    draw_at,
    infer_labels,
    only_known,
    organ_dice,
    to_device,
    voxel_logits,
)
from apps.imaging.windows import WindowPlan
from core_model.model import MoETransformer

if TYPE_CHECKING:
    from core_model.voxels import VoxelHead

GOOD_DICE = 0.7  # below, an organ is poorly found
MISS_RATE = 0.1
SENSITIVITY = 0.95
VOXELS_EACH = 20_000  # of a window, for the temperature
TEMPERATURES = np.geomspace(0.5, 4.0, 43)


@torch.no_grad()
def fit_temperature(model: MoETransformer, held: Sequence[Known]) -> float:
    """Set and return the temperature that makes held-out voxels likeliest.

    Half of the voxels are of organs, as far as there are any, so that air does not decide.
    """
    device = str(next(model.parameters()).device)
    rng = np.random.default_rng(0)
    kept_logits: list[Tensor] = []
    kept_known: list[Tensor] = []
    kept_labels: list[Tensor] = []
    for case in held:
        plan = WindowPlan(case.hu)
        for corner in plan.corners:
            packed = collate([draw_at(plan, case.volume.labels, corner)])
            batch, labels, known = to_device(packed, device)
            logits = voxel_logits(model, batch)[0][0].flatten(1).T.cpu()
            truth = labels.flatten().cpu()
            organ, other = np.flatnonzero(truth > 0), np.flatnonzero(truth == 0)
            num = min(VOXELS_EACH // 2, organ.size)
            chosen = np.concatenate(
                [rng.permutation(organ)[:num], rng.permutation(other)[: VOXELS_EACH - num]]
            )
            kept_logits.append(logits[chosen])
            kept_known.append(known.cpu().expand(len(chosen), -1))
            kept_labels.append(truth[chosen])
    logits, known, labels = (torch.cat(each) for each in (kept_logits, kept_known, kept_labels))
    losses = [
        float(functional.cross_entropy(only_known(logits / t, known), labels)) for t in TEMPERATURES
    ]
    temperature = float(TEMPERATURES[int(np.argmin(losses))])
    cast("VoxelHead", model.heads[TASK]).temperature.fill_(temperature)
    return temperature


def fit_calibration(
    model: MoETransformer, seen: Sequence[Known], held: Sequence[Known]
) -> tuple[Calibration, NDArray[np.float64]]:
    """Return the calibration, and the Dice of each held-out organ [cases, organs], NaN where not contoured.

    Args:
        model: Trained, with its temperature.
        seen: Training cases, for what is ordinary.
        held: Cases that it was not trained on.
    """
    profiles = np.stack([profile(case.grid, case.hu) for case in seen])
    scale = np.maximum(profiles.std(axis=0), 1e-2)
    plain = Calibration(
        {}, MISS_RATE, tuple(profiles.mean(axis=0).tolist()), tuple(scale.tolist()), 1.0, 0.0, 1.0
    )
    distances = [plain.distance(profile(case.grid, case.hu)) for case in held]
    farthest = max(distances)
    dice = np.full((len(held), len(ORGANS)), np.nan)
    sure = np.full_like(dice, np.nan)
    for i, case in enumerate(held):
        labels, confidence, _ = infer_labels(model, case.hu)
        dice[i] = organ_dice(labels, case.volume.labels)
        for organ in range(len(ORGANS)):
            said = labels == organ + 1
            if said.any():
                sure[i, organ] = confidence[said].mean() / 255.0
    least = {name: _least_sure(sure[:, i], dice[:, i]) for i, name in enumerate(ORGANS)}
    whole = np.array(
        [
            case_confidence(row[~np.isnan(row)].tolist(), d / farthest, ())
            for row, d in zip(sure, distances, strict=True)
        ]
    )
    refer_below, reached = _referral(whole, np.nanmean(dice, axis=1))
    calibration = Calibration(
        least_sure=least,
        miss_rate=MISS_RATE,
        profile_mean=plain.profile_mean,
        profile_scale=plain.profile_scale,
        farthest=farthest,
        refer_below=refer_below,
        sensitivity=reached,
    )
    return calibration, dice


def _least_sure(sure: NDArray[np.float64], dice: NDArray[np.float64]) -> float:
    """Return the confidence that at most ``MISS_RATE`` of poorly found organs reach.

    Conformal: the (n + 1)-th share of n poor cases; with too few of them, above them all.
    """
    found = ~np.isnan(sure) & ~np.isnan(dice)
    poor = np.sort(sure[found & (dice < GOOD_DICE)])[::-1]
    if poor.size == 0:
        return float(sure[found].min()) if found.any() else 1.0
    rank = int((poor.size + 1) * MISS_RATE)
    return (
        float(np.nextafter(poor[0], 2.0)) if rank == 0 else float(np.nextafter(poor[rank - 1], 2.0))
    )


def _referral(whole: NDArray[np.float64], dice: NDArray[np.float64]) -> tuple[float, float]:
    """Return the confidence below which ``SENSITIVITY`` of the poor cases lie, and their share."""
    poor = whole[dice < GOOD_DICE]
    if poor.size == 0:
        return float(whole.min()), 1.0
    threshold = float(np.nextafter(np.quantile(poor, SENSITIVITY, method="higher"), 2.0))
    return threshold, float((poor < threshold).mean())
