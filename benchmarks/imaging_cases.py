"""Studies for measurements: slices written as a scanner or a data set would give them.

Volumes are generated phantoms, or patients of OpenKBP where their folder is given.  Writing is
for uncompressed 16-bit DICOM CT and for NIfTI; what is wrong on purpose is ``imaging_faults``.

Legend: K J I slices, rows and columns; Z Y X axes of the model's grid.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from apps.imaging.openkbp import load_patient
from apps.imaging.outputs.label_map import volume_grid
from apps.imaging.phantom import PhantomShape, make_phantom
from apps.imaging.resample import PatientGrid
from apps.imaging.stack import SliceStack
from apps.imaging.windows import GRID_MM

INTERCEPT_HU = -1024  # the usual one, so that stored values are not negative
SERIES, LABELS = "series", "labels.npy"  # of the whole body
WHOLE_BODY = PhantomShape(slices=400, pixels=512, slice_mm=1.0, pixel_mm=0.9)


def write_series(stack: SliceStack, folder: Path, name: str) -> list[Path]:
    """Write slices as a DICOM series, one file each, and return the paths in their order.

    Args:
        stack: Acquired slices, none below -1024 HU.
        folder: Made if it is missing.
        name: The UIDs follow from it.

    Raises:
        ValueError: A value does not fit 16 bits without sign.
    """
    return write_slices(dicom_slices(stack, name), folder)


def write_slices(slices: Iterable[FileDataset], folder: Path) -> list[Path]:
    """Write DICOM objects as numbered files of a folder and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, slice_ in enumerate(slices):
        paths.append(folder / f"{index:04d}.dcm")
        slice_.save_as(paths[-1], enforce_file_format=True)
    return paths


def dicom_slices(stack: SliceStack, name: str) -> Iterator[FileDataset]:
    """Yield slices as DICOM objects; see ``write_series``."""
    low = int(stack.hu.min())
    if low < INTERCEPT_HU:
        message = f"series {name}: expected values from {INTERCEPT_HU} HU, got {low}; clip them"
        raise ValueError(message)
    thickness_mm = float(np.median(np.diff(stack.positions_mm)))
    uids = {
        keyword: generate_uid(entropy_srcs=[name, keyword])
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    }
    for index, (hu, origin_mm) in enumerate(zip(stack.hu, stack.origins_mm, strict=True)):
        slice_ = _picture(hu, generate_uid(entropy_srcs=[name, str(index)]))
        slice_.PatientID = name
        for keyword, uid in uids.items():
            setattr(slice_, keyword, uid)
        slice_.SeriesNumber, slice_.InstanceNumber = 1, index + 1
        slice_.SliceThickness = _digits(thickness_mm)
        slice_.PixelSpacing = [_digits(mm) for mm in stack.pixel_mm]
        slice_.ImagePositionPatient = [_digits(mm) for mm in origin_mm]
        slice_.ImageOrientationPatient = [
            _digits(part) for part in (*stack.row_axis, *stack.column_axis)
        ]
        yield slice_


def _picture(hu: NDArray[np.int16], uid: UID) -> FileDataset:
    """Return one slice [J, I] without its place."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid
    slice_ = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta)
    slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, uid
    slice_.Modality, slice_.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
    slice_.Rows, slice_.Columns = hu.shape
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
    slice_.PixelRepresentation = 0
    slice_.RescaleSlope, slice_.RescaleIntercept, slice_.RescaleType = 1, INTERCEPT_HU, "HU"
    stored = hu.astype(np.int32) - INTERCEPT_HU
    slice_.PixelData = stored.astype("<u2").tobytes()
    return slice_


def _digits(value: float) -> float:
    """Return a number that fits the 16 characters of a decimal string."""
    return float(f"{value:.9g}")


def write_volume(stack: SliceStack, path: Path) -> None:
    """Write slices as one NIfTI file.

    Args:
        stack: In equal steps on a line, as an affine has to say it.
        path: Ends in ``.nii`` or ``.nii.gz``; its folder is made if it is missing.

    Raises:
        ValueError: The steps are not equal.
    """
    grid = volume_grid(stack)
    if grid is None or grid.is_resampled:
        message = f"{path.name}: expected slices in equal steps, got others; write them as DICOM"
        raise ValueError(message)
    image = nibabel.Nifti1Image(stack.hu.transpose(2, 1, 0), grid.affine)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def volumes(num: int, data: Path | None = None) -> Iterator[SliceStack]:
    """Yield volumes, always the same ones in the same order.

    Args:
        num: How many.
        data: Folder of OpenKBP's ``pt_*.npz``, at any depth; None generates phantoms of the
            same size.

    Raises:
        FileNotFoundError: There are fewer patients.
    """
    if data is None:
        for seed in range(num):
            yield make_phantom(seed)[0]
        return
    paths = sorted(data.rglob("pt_*.npz"))
    if len(paths) < num:
        message = f"{data}: expected {num} files pt_*.npz or more, found {len(paths)}"
        raise FileNotFoundError(message)
    for path in paths[:num]:
        yield load_patient(path)[0]


def write_cases(num: int, folder: Path, data: Path | None = None) -> Mapping[str, int]:
    """Write so many good cases into a folder: each second one as DICOM, the others as NIfTI.

    Returns:
        The number of slices of each, by its name.
    """
    found = {}
    for index, stack in enumerate(volumes(num, data)):
        name = f"case-{index:03d}"
        if index % 2:
            write_volume(stack, folder / f"{name}.nii.gz")
        else:
            write_series(stack, folder / name, name)
        found[name] = stack.num_slices
    return found


def studies(num: int, work: Path, data: Path | None = None) -> Path:
    """Return a folder of so many good cases below ``work``; see ``write_cases``."""

    def write(folder: Path) -> None:
        write_cases(num, folder, data)

    source = "phantoms" if data is None else "patients"
    return _kept(work / f"studies-{num}-{source}", write)


def whole_body(work: Path, shape: PhantomShape = WHOLE_BODY) -> Path:
    """Return a generated case below ``work``, by default of 512 x 512 x 400.

    Returns:
        A folder with the DICOM files in ``SERIES``, and in ``LABELS`` its organs on the model's
        grid, uint8 [Z, Y, X].
    """

    def write(folder: Path) -> None:
        stack, labels = make_phantom(0, shape)
        write_series(stack, folder / SERIES, "whole-body")
        np.save(folder / LABELS, PatientGrid(stack, GRID_MM).gather(labels))

    return _kept(work / f"whole-body-{shape.pixels}-{shape.slices}", write)


def _kept(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return a folder that is written once, in whole, and kept."""
    if not folder.exists():
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        write(new)
        new.rename(folder)
    return folder
