"""Ten studies that no scanner meant to give: each broken in one way, and the reason it must get.

A fault takes the slices of a good study and writes a folder of its own, in which there is
exactly one case.  None of them can be repaired; what can be is in the tests of reading.

Legend: K J I slices, rows and columns.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom import FileDataset
from pydicom.uid import generate_uid

from apps.imaging.stack import SliceStack
from benchmarks.imaging_cases import dicom_slices, write_series, write_slices, write_volume

BOMB_MEMBERS, BOMB_BYTES = 5, 2**24  # a thousand times their size in the archive
SFORM_AT = 280  # of a NIfTI-1 header: three rows of the affine
TEXT = "This is a note about the study, no slice of it.\n"


class Fault(NamedTuple):
    """One way to break a study.

    Args:
        reason: Code that the case must be quarantined with.
        write: Takes the good slices, and the folder to write.
    """

    reason: str
    write: Callable[[SliceStack, Path], None]


def _cut_files(stack: SliceStack, folder: Path) -> None:
    """Most files end amid their pixels; two slices are whole."""
    for path in write_series(stack, folder, folder.name)[2:]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _middle_missing(stack: SliceStack, folder: Path) -> None:
    """A quarter of the slices is not there."""
    paths = write_series(stack, folder, folder.name)
    for path in paths[3 * len(paths) // 8 : 5 * len(paths) // 8]:
        path.unlink()


def _each(change: Callable[[FileDataset], None]) -> Callable[[SliceStack, Path], None]:
    """Return a fault that changes every slice before it is written."""

    def write(stack: SliceStack, folder: Path) -> None:
        slices = list(dicom_slices(stack, folder.name))
        for slice_ in slices:
            change(slice_)
        write_slices(slices, folder)

    return write


def _without_pixels(slice_: FileDataset) -> None:
    del slice_.PixelData


def _without_rescale(slice_: FileDataset) -> None:
    del slice_.RescaleSlope, slice_.RescaleIntercept


def _call_localiser(slice_: FileDataset) -> None:
    slice_.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def _text_as_dicom(_stack: SliceStack, folder: Path) -> None:
    folder.mkdir(parents=True)
    for index in range(3):
        (folder / f"{index:04d}.dcm").write_text(TEXT, encoding="utf-8")


def _empty(_stack: SliceStack, folder: Path) -> None:
    folder.mkdir(parents=True)


def _overwritten(at: int, data: bytes) -> Callable[[SliceStack, Path], None]:
    """Return a fault that overwrites bytes of a NIfTI header."""

    def write(stack: SliceStack, folder: Path) -> None:
        path = folder / "ct.nii"
        write_volume(stack, path)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    return write


def _bomb(_stack: SliceStack, folder: Path) -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(BOMB_MEMBERS):
            archive.writestr(f"{index:04d}.dcm", bytes(BOMB_BYTES))


def _two_pictures_of_a_place(stack: SliceStack, folder: Path) -> None:
    """A slice is there again with the pixels of its neighbour."""
    slices = list(dicom_slices(stack, folder.name))
    write_slices(slices, folder)
    again, neighbour = slices[stack.num_slices // 2 :][:2]
    again.PixelData = neighbour.PixelData
    again.SOPInstanceUID = generate_uid(entropy_srcs=[folder.name, "again"])
    again.file_meta.MediaStorageSOPInstanceUID = again.SOPInstanceUID
    again.save_as(folder / "again.dcm", enforce_file_format=True)


FAULTS: Mapping[str, Fault] = {
    "cut-files": Fault("FILE_TRUNCATED", _cut_files),
    "middle-missing": Fault("GAP_TOO_WIDE", _middle_missing),
    "no-pixels": Fault("FILE_TRUNCATED", _each(_without_pixels)),
    "no-rescale": Fault("RESCALE_MISSING", _each(_without_rescale)),
    "localiser": Fault("LOCALISER", _each(_call_localiser)),
    "text": Fault("FOREIGN_FILE", _text_as_dicom),
    "empty": Fault("PLACE_EMPTY", _empty),
    "no-affine": Fault(
        "AFFINE_INVALID", _overwritten(SFORM_AT, np.full(12, np.nan, "<f4").tobytes())
    ),
    "bomb": Fault("ARCHIVE_RATIO", _bomb),
    "two-pictures": Fault("POSITION_CONFLICT", _two_pictures_of_a_place),
}


def write_faults(stack: SliceStack, folder: Path, num: int = len(FAULTS)) -> Mapping[str, str]:
    """Write a broken study of each of the first kinds into a folder.

    Returns:
        The reason that each of them must get, by its name.
    """
    chosen = list(FAULTS.items())[:num]
    for name, fault in chosen:
        fault.write(stack, folder / name)
    return {name: fault.reason for name, fault in chosen}
