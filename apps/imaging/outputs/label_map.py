"""Label map and confidence as NIfTI, in the geometry of the slices.

NIfTI knows one affine for a whole volume.  That holds equal steps, and also a tilted gantry,
whose volume is a sheared box: the affine has the shear, and the voxels are those of the slices.
It does not hold unequal steps.  Then the volume gets the smallest step that occurs, and each of
its slices is a copy of the nearest one in place; nothing is blended, so labels stay labels.
``grid.json`` beside the files says for every NIfTI slice which slice of the case it shows and
how far that one lies, so the way back is exact.  Slices that do not lie on a line fit no affine
at all: nothing is written, and the report says so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from apps.imaging.finding import Findings
from apps.imaging.outputs.derived import NOTICE
from apps.imaging.stack import SliceStack

TOLERANCE_MM = 0.1  # how far a slice may be from where the affine says it is
MIN_STEP_MM = 0.5  # of a volume made of unequal steps: bounds its size
SCANNER = 1  # code of an affine into the scanner's space, in NIfTI
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True, eq=False)
class VolumeGrid:
    """One affine for a stack, and which slice stands where.

    Args:
        affine: From voxel (column, row, slice) to mm (right, anterior, superior), [4, 4].
        slices: Slice of the stack that each slice of the volume shows.
        distance_mm: How far each of them lies from where the volume says it is.
        is_resampled: Whether slices were repeated, since their steps are unequal.
    """

    affine: NDArray[np.float64]
    slices: NDArray[np.intp]
    distance_mm: NDArray[np.float64]
    is_resampled: bool


def volume_grid(stack: SliceStack) -> VolumeGrid | None:
    """Return the grid of a stack, or None if its slices do not lie on a line."""
    along, places_mm = _line(stack)
    off_mm = stack.origins_mm - stack.origins_mm[0] - np.outer(places_mm, along)
    if np.linalg.norm(off_mm, axis=1).max() > TOLERANCE_MM:
        return None
    num = stack.num_slices
    step_mm = places_mm[-1] / (num - 1) if num > 1 else 1.0
    distance_mm = np.abs(step_mm * np.arange(num) - places_mm)
    if distance_mm.max() <= TOLERANCE_MM:
        return VolumeGrid(_affine(stack, step_mm * along), np.arange(num), distance_mm, False)
    step_mm = max(float(np.diff(places_mm).min()), MIN_STEP_MM)
    wanted_mm = np.arange(0.0, places_mm[-1] + step_mm / 2, step_mm)
    slices = np.abs(wanted_mm[:, None] - places_mm).argmin(axis=1)
    distance_mm = np.abs(wanted_mm - places_mm[slices])
    return VolumeGrid(_affine(stack, step_mm * along), slices, distance_mm, True)


def write_label_map(
    stack: SliceStack, findings: Findings, grid: VolumeGrid, directory: Path
) -> Mapping[str, str]:
    """Write ``labels.nii.gz``, ``confidence.nii.gz`` and ``grid.json`` into a directory.

    Returns:
        Their names by what they are.
    """
    _save(findings.labels, grid, directory / "labels.nii.gz", "label")
    _save(findings.confidence, grid, directory / "confidence.nii.gz", "none")
    description = {
        "notice": NOTICE,
        "labels": {str(organ.label): organ.name for organ in findings.organs},
        "confidence": "calibrated probability of the label, 255 = 1",
        "is_resampled": grid.is_resampled,
        "slices": grid.slices.tolist(),
        "distance_mm": grid.distance_mm.round(3).tolist(),
        "is_interpolated": stack.is_interpolated[grid.slices].tolist(),
    }
    (directory / "grid.json").write_text(json.dumps(description) + "\n", encoding="utf-8")
    return {"labels": "labels.nii.gz", "confidence": "confidence.nii.gz", "grid": "grid.json"}


def _line(stack: SliceStack) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the direction from the first slice to the last, and the places along it."""
    offsets_mm = stack.origins_mm - stack.origins_mm[0]
    length_mm = np.linalg.norm(offsets_mm[-1])
    along = offsets_mm[-1] / length_mm if length_mm > 0 else stack.normal
    return along, offsets_mm @ along


def _affine(stack: SliceStack, step: NDArray[np.float64]) -> NDArray[np.float64]:
    row_mm, column_mm = stack.pixel_mm
    affine = np.eye(4)
    affine[:3, 0] = LPS_TO_RAS * stack.row_axis * column_mm
    affine[:3, 1] = LPS_TO_RAS * stack.column_axis * row_mm
    affine[:3, 2] = LPS_TO_RAS * step
    affine[:3, 3] = LPS_TO_RAS * stack.origins_mm[0]
    return affine


def _save(volume: NDArray[np.uint8], grid: VolumeGrid, path: Path, intent: str) -> None:
    shown = volume[grid.slices] if grid.is_resampled else volume
    image = nibabel.Nifti1Image(shown.transpose(2, 1, 0), grid.affine)
    image.set_sform(grid.affine, code=SCANNER)
    image.set_qform(grid.affine, code=0 if _is_sheared(grid.affine) else SCANNER)
    image.header.set_intent(intent)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"trimoe. {NOTICE}"
    nibabel.save(image, path)


def _is_sheared(affine: NDArray[np.float64]) -> bool:
    """Return whether the axes are not at right angles, which a qform cannot say."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > 1e-4)
