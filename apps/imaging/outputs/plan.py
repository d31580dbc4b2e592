"""What a case will get: which slices are shown, which files are written, why others are not."""

from collections.abc import Mapping
from dataclasses import dataclass

from apps.imaging.outputs.derived import Derivation
from apps.imaging.outputs.label_map import VolumeGrid, volume_grid
from apps.imaging.outputs.segmentation import segmented_organs
from apps.imaging.outputs.selection import choose_slices
from apps.imaging.outputs.settings import Kind

LAYERS = ("organs", "confidence", "experts")
DICOM_KINDS = frozenset({Kind.SEGMENTATION, Kind.MEASUREMENTS, Kind.CAPTURE})
FILES: Mapping[Kind, Mapping[str, str]] = {
    Kind.REPORT: {"report": "report.html"},
    Kind.SEGMENTATION: {"segmentation": "segmentation.dcm"},
    Kind.MEASUREMENTS: {"measurements": "measurements.dcm"},
    Kind.NIFTI: {
        "labels": "labels.nii.gz",
        "confidence": "confidence.nii.gz",
        "grid": "grid.json",
    },
    Kind.CAPTURE: {"capture": "capture.dcm"},
    Kind.PDF: {"pdf": "report.pdf", "pdf_dicom": "report.dcm"},
}


@dataclass(frozen=True, eq=False)
class Plan:
    """What a case will get.

    Args:
        slices: Indices of those shown.
        grid: Of the NIfTI files; None if there is none.
        files: Paths by name, relative to the directory of the case.
        notes: Sentences on what is not written or not as one might think.
    """

    slices: tuple[int, ...]
    grid: VolumeGrid | None
    files: Mapping[str, str]
    notes: tuple[str, ...]


def plan_of(derivation: Derivation) -> Plan:
    """Return what will be written of a case with findings."""
    kinds, notes = set(derivation.settings.kinds), []
    is_dicom = bool(derivation.acquired)
    if not is_dicom and kinds & {*DICOM_KINDS, Kind.PDF}:
        kinds -= DICOM_KINDS
        notes.append("No DICOM objects: the input has no DICOM series that they could refer to.")
    elif Kind.SEGMENTATION in kinds and not segmented_organs(derivation):
        kinds -= {Kind.SEGMENTATION, Kind.MEASUREMENTS}
        notes.append("No DICOM SEG and SR: no organ was found on an acquired slice.")
    grid = volume_grid(derivation.stack) if Kind.NIFTI in kinds else None
    if grid is None:
        if Kind.NIFTI in kinds:
            notes.append("No NIfTI: the slices do not lie on a line, which no affine can say.")
        kinds -= {Kind.NIFTI}
    elif grid.is_resampled:
        notes.append(_resampling(grid))
    slices = choose_slices(derivation.stack, derivation.findings)
    files = {name: path for kind in Kind if kind in kinds for name, path in _files(kind, slices)}
    if not is_dicom:
        files.pop("pdf_dicom", None)
    return Plan(slices, grid, files, tuple(notes))


def overlay_path(index: int, layer: str) -> str:
    """Return where the overlay of a slice lies; slices count from 1, as in the report."""
    return f"overlays/slice-{index + 1:04d}-{layer}.png"


def _files(kind: Kind, slices: tuple[int, ...]) -> list[tuple[str, str]]:
    if kind is Kind.OVERLAYS:
        pairs = [(index, layer) for index in slices for layer in LAYERS]
        return [(f"overlay_{i + 1}_{layer}", overlay_path(i, layer)) for i, layer in pairs]
    return list(FILES[kind].items())


def _resampling(grid: VolumeGrid) -> str:
    return (
        f"NIfTI: the slices have unequal steps, which one affine cannot say; each of its "
        f"{len(grid.slices)} slices repeats the nearest one of the case, at most "
        f"{grid.distance_mm.max():.2f} mm away (grid.json names it)."
    )
