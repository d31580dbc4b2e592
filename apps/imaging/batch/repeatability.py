"""How far two runs of one case agree: status, places, measurements and labels.

Two runs on the same machine agree exactly.  Another device sums in another order, so voxels
on the edge of an organ may change sides; the tolerances leave room for that and no more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.imaging.finding import Organ
from apps.imaging.outputs.summary import CaseSummary

LABELS = "labels"  # name of the output with the label map


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What two runs may differ by.

    Args:
        dice: Overlap of each organ's voxels, at least: 2 |A and B| / (|A| + |B|).
        volume_share: Of the volume of an organ, where that is more than ``volume_ml``.
        volume_ml: Of the volume of a small organ.
        mean_hu: Of the mean density of an organ.
        confidence: Of an organ and of the case.
        place_mm: Of each slice.
    """

    dice: float = 0.99
    volume_share: float = 0.01
    volume_ml: float = 0.05
    mean_hu: float = 2.0
    confidence: float = 0.02
    place_mm: float = 1e-3


TOLERANCE = Tolerance()


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a case.

    Args:
        summary: Of the case.
        root: Directory that its outputs are relative to.
    """

    summary: CaseSummary
    root: Path

    def labels(self) -> NDArray[np.uint8] | None:
        """Return its label map, None if none was written."""
        path = self.summary.outputs.get(LABELS)
        if path is None:
            return None
        import nibabel  # noqa: PLC0415 - half of a driver's start, and few compare labels

        return np.asarray(
            nibabel.Nifti1Image.from_filename(self.root / path).dataobj, dtype=np.uint8
        )


def differences(first: Run, again: Run, may: Tolerance) -> Iterator[str]:
    """Yield in what two runs of a case differ by more than they may."""
    return chain(
        _case_differences(first.summary, again.summary, may),
        _organ_differences(first.summary, again.summary, may),
        _label_differences(first.labels(), again.labels(), may),
    )


def _case_differences(first: CaseSummary, again: CaseSummary, may: Tolerance) -> Iterator[str]:
    codes, codes_again = ([reason.code for reason in each.reasons] for each in (first, again))
    for what, before, now in (
        ("status", first.status.value, again.status.value),
        ("reasons", ", ".join(codes), ", ".join(codes_again)),
        ("model", first.model_version, again.model_version),
        ("slices", first.num_slices, again.num_slices),
    ):
        if before != now:
            yield f"{what}: {before or 'none'}, now {now or 'none'}"
    places, places_again = first.slice_positions_mm, again.slice_positions_mm
    if len(places) == len(places_again) and not np.allclose(
        places, places_again, rtol=0, atol=may.place_mm
    ):
        yield f"slice positions: differ by more than {may.place_mm} mm"
    if _differ(first.confidence_case, again.confidence_case, may.confidence):
        yield f"confidence: {first.confidence_case}, now {again.confidence_case}"


def _organ_differences(first: CaseSummary, again: CaseSummary, may: Tolerance) -> Iterator[str]:
    organs, organs_again = ({organ.name: organ for organ in each.organs} for each in (first, again))
    if organs.keys() != organs_again.keys():
        yield f"organs: {len(organs)} measured, now {len(organs_again)}"
        return
    for name, organ in organs.items():
        yield from _measured_differences(organ, organs_again[name], may)


def _measured_differences(organ: Organ, again: Organ, may: Tolerance) -> Iterator[str]:
    volume_ml = max(may.volume_ml, may.volume_share * organ.volume_ml)
    for what, before, now, limit in (
        ("ml", organ.volume_ml, again.volume_ml, volume_ml),
        ("HU", organ.mean_hu, again.mean_hu, may.mean_hu),
        ("confidence", organ.confidence, again.confidence, may.confidence),
    ):
        if _differ(before, now, limit):
            yield f"{organ.name}: {before:.4g} {what}, now {now:.4g}"


def _differ(first: float | None, again: float | None, limit: float) -> bool:
    if first is None or again is None:
        return first is not again
    if np.isnan(first) or np.isnan(again):
        return bool(np.isnan(first) != np.isnan(again))
    return abs(first - again) > limit


def _label_differences(
    first: NDArray[np.uint8] | None, again: NDArray[np.uint8] | None, may: Tolerance
) -> Iterator[str]:
    if first is None or again is None:
        if first is not again:
            yield "label map: written in one of the runs alone"
    elif first.shape != again.shape:
        yield f"label map: {first.shape}, now {again.shape}"
    else:
        for label, overlap in dice_of(first, again).items():
            if overlap < may.dice:
                yield f"label {label}: Dice {overlap:.4f}, expected {may.dice} at least"


def dice_of(first: NDArray[np.uint8], again: NDArray[np.uint8]) -> dict[int, float]:
    """Return the Dice overlap of every label but 0 that occurs in one of two maps."""
    sizes, sizes_again = (np.bincount(each.ravel(), minlength=256) for each in (first, again))
    common = np.bincount(first[first == again], minlength=256)
    labels = np.flatnonzero(sizes + sizes_again)
    return {
        int(label): float(2 * common[label] / (sizes[label] + sizes_again[label]))
        for label in labels[labels > 0]
    }
