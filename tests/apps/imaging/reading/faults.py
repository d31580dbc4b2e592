"""Series on disk with one thing wrong: what real exports, scanners and attackers do.

A fault takes the slices of a good series, in order along their normal, and writes a folder.
"""

import copy
import io
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset, FileMetaDataset, dcmwrite
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    generate_uid,
)

Slices = list[FileDataset]
NUM_SLICES = 28  # as many as the series of the evaluation data have
PIXELS = 32
STEP_MM = 5.0


def generated_slices() -> Slices:
    """Return a small series: a body with a bone in air, 5 mm steps, offset -1024 as usual."""
    rng = np.random.default_rng(4)
    z, y, x = np.ogrid[-1 : 1 : NUM_SLICES * 1j, -1 : 1 : PIXELS * 1j, -1 : 1 : PIXELS * 1j]
    hu = np.where(x**2 + y**2 < 0.7 + 0.1 * z, 40.0, -1000.0)
    hu[(x - 0.2) ** 2 + (y + 0.3 * z) ** 2 < 0.03] = 900
    hu = (hu + rng.normal(0, 8, hu.shape)).round().clip(-1024).astype(np.int16)
    study, series, reference = (generate_uid(entropy_srcs=[name]) for name in "abc")
    return [
        ct_slice(
            values,
            (-40.0, -50.0, 12.5 + STEP_MM * k),
            StudyInstanceUID=study,
            SeriesInstanceUID=series,
            FrameOfReferenceUID=reference,
            InstanceNumber=k + 1,
        )
        for k, values in enumerate(hu)
    ]


def ct_slice(hu: NDArray[np.int16], position: Sequence[float], **values: object) -> FileDataset:
    """Return one slice of 2.5 mm pixels; further elements by keyword."""
    meta = FileMetaDataset()
    meta.FileMetaInformationGroupLength = 0  # the writer fills it in
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    slice_ = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta)
    slice_.SOPClassUID = CTImageStorage
    slice_.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    slice_.Modality = "CT"
    slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    slice_.PatientName = "Nobody^Known"
    slice_.SliceThickness = STEP_MM
    slice_.ImagePositionPatient = list(position)
    slice_.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    slice_.PixelSpacing = [2.5, 2.5]
    slice_.SamplesPerPixel = 1
    slice_.PhotometricInterpretation = "MONOCHROME2"
    slice_.Rows, slice_.Columns = hu.shape
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 12, 11
    slice_.PixelRepresentation = 0
    slice_.RescaleSlope, slice_.RescaleIntercept = 1, -1024
    slice_.PixelData = (hu.astype(np.int32) + 1024).astype("<u2").tobytes()
    for keyword, value in values.items():
        setattr(slice_, keyword, value)
    return slice_


def write_all(slices: Iterable[Dataset], folder: Path, suffix: str = ".dcm") -> list[Path]:
    """Write slices as numbered files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, slice_ in enumerate(slices):
        paths.append(folder / f"{k:03d}{suffix}")
        dcmwrite(paths[-1], slice_, enforce_file_format=False)
    return paths


# What a fault does to the slices before they are written


def changed(
    change: Callable[[FileDataset], object], *indices: int
) -> Callable[[Slices, Path], None]:
    """Return a fault that changes some slices, all if none is named."""

    def write(slices: Slices, folder: Path) -> None:
        for k in indices or range(len(slices)):
            change(slices[k])
        write_all(slices, folder)

    return write


def dropped(*indices: int) -> Callable[[Slices, Path], None]:
    def write(slices: Slices, folder: Path) -> None:
        write_all([each for k, each in enumerate(slices) if k not in indices], folder)

    return write


def cut(num_bytes: int, *indices: int) -> Callable[[Slices, Path], None]:
    """Return a fault that cuts files after some bytes; a negative number counts from the end."""

    def write(slices: Slices, folder: Path) -> None:
        paths = write_all(slices, folder)
        for k in indices:
            paths[k].write_bytes(paths[k].read_bytes()[:num_bytes])

    return write


def beside(*extras: Callable[[Slices], tuple[str, bytes]]) -> Callable[[Slices, Path], None]:
    """Return a fault that puts files beside a good series."""

    def write(slices: Slices, folder: Path) -> None:
        write_all(slices, folder)
        for extra in extras:
            name, data = extra(slices)
            (folder / name).write_bytes(data)

    return write


def on_disk(name: str, data: bytes) -> Callable[[Slices, Path], None]:
    def write(slices: Slices, folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_bytes(data)

    return write


def without(keyword: str) -> Callable[[FileDataset], object]:
    def change(slice_: FileDataset) -> None:
        delattr(slice_, keyword)

    return change


def having(**values: object) -> Callable[[FileDataset], object]:
    def change(slice_: FileDataset) -> None:
        for keyword, value in values.items():
            setattr(slice_, keyword, value)

    return change


def as_bytes(dataset: Dataset) -> bytes:
    stream = io.BytesIO()
    dcmwrite(stream, dataset, enforce_file_format=False)
    return stream.getvalue()


def copy_of(slice_: FileDataset, **values: object) -> FileDataset:
    other = copy.deepcopy(slice_)
    renamed(other)
    having(**values)(other)
    return other


def renamed(slice_: FileDataset) -> None:
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = generate_uid()


# Single faults


def shuffled_names(slices: Slices, folder: Path) -> None:
    random.Random(1).shuffle(slices)
    write_all(slices, folder)


def in_reverse(slices: Slices, folder: Path) -> None:
    for k, slice_ in enumerate(slices):
        slice_.InstanceNumber = len(slices) - k
    write_all(reversed(slices), folder)


def without_suffix(slices: Slices, folder: Path) -> None:
    write_all(slices, folder, suffix="")


def duplicate(slices: Slices, folder: Path) -> None:
    write_all([*slices, slices[10]], folder)


def duplicate_renamed(slices: Slices, folder: Path) -> None:
    write_all([*slices, copy_of(slices[10])], folder)


def duplicate_changed(slices: Slices, folder: Path) -> None:
    other = copy_of(slices[10], PixelData=slices[11].PixelData)
    write_all([*slices, other], folder)


def moved(slices: Slices, first: int, shift: Callable[[int], float]) -> None:
    """Move slices from ``first`` on along the third axis, in mm."""
    for k, slice_ in enumerate(slices[first:], start=1):
        x, y, z = slice_.ImagePositionPatient
        slice_.ImagePositionPatient = [x, y, float(z) + shift(k)]


def mixed_spacing(slices: Slices, folder: Path) -> None:
    moved(slices, 14, lambda k: 2.5 * k)
    write_all(slices, folder)


def short_step(slices: Slices, folder: Path) -> None:
    moved(slices, 14, lambda _: -3.92)
    write_all(slices, folder)


def tilted(slices: Slices) -> None:
    angle = np.radians(12.0)
    for slice_ in slices:
        slice_.ImageOrientationPatient = [1, 0, 0, 0, float(np.cos(angle)), -float(np.sin(angle))]


def tilt(slices: Slices, folder: Path) -> None:
    tilted(slices)
    write_all(slices, folder)


def tilt_and_drop(slices: Slices, folder: Path) -> None:
    tilted(slices)
    write_all([*slices[:10], *slices[11:]], folder)


def shifted(slice_: FileDataset) -> None:
    x, y, z = slice_.ImagePositionPatient
    slice_.ImagePositionPatient = [float(x) + 2, y, z]


def halved(slice_: FileDataset) -> None:
    pixels = slice_.pixel_array[::2, ::2]
    slice_.Rows, slice_.Columns = pixels.shape
    slice_.PixelData = pixels.tobytes()


def without_any_sop_uid(slice_: FileDataset) -> None:
    del slice_.SOPInstanceUID, slice_.file_meta.MediaStorageSOPInstanceUID


def without_rescale(slice_: FileDataset) -> None:
    del slice_.RescaleSlope, slice_.RescaleIntercept


def two_series(slices: Slices, folder: Path) -> None:
    other = generate_uid()
    write_all([*slices, *(copy_of(each, SeriesInstanceUID=other) for each in slices)], folder)


def two_acquisitions(slices: Slices, folder: Path) -> None:
    first = [copy_of(each, AcquisitionNumber=1) for each in slices]
    for each in slices:
        each.AcquisitionNumber = 2
    write_all([*slices, *first], folder)


def localiser(slices: Slices) -> tuple[str, bytes]:
    scout = copy_of(
        slices[0],
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
    )
    return "scout.dcm", as_bytes(scout)


def unmarked_localiser(slices: Slices) -> tuple[str, bytes]:
    return "scout.dcm", as_bytes(copy_of(slices[0], ImageOrientationPatient=[1, 0, 0, 0, 0, -1]))


def scout_series(slices: Slices) -> tuple[str, bytes]:
    """A localiser that does not say so, in a series of its own."""
    values = {"SeriesInstanceUID": generate_uid(), "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
    return "scout.dcm", as_bytes(copy_of(slices[0], **values))


def dose_report(slices: Slices) -> tuple[str, bytes]:
    report = copy_of(slices[0], SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67", Modality="SR")
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID
    for keyword in ("PixelData", "Rows", "Columns"):
        del report[keyword]
    return "dose.dcm", as_bytes(report)


def compressed(syntax: str) -> Callable[[Slices, Path], None]:
    return changed(lambda slice_: slice_.compress(syntax, generate_instance_uid=False))


def encoded(slices: Slices, folder: Path, syntax: str, *, is_little: bool) -> None:
    folder.mkdir()
    for k, slice_ in enumerate(slices):
        slice_.file_meta.TransferSyntaxUID = UID(syntax)
        if not is_little:
            values = np.frombuffer(slice_.PixelData, "<u2")
            slice_.PixelData = values.astype(">u2").tobytes()
        dcmwrite(
            folder / f"{k}.dcm",
            slice_,
            implicit_vr=syntax == ImplicitVRLittleEndian,
            little_endian=is_little,
            enforce_file_format=True,
        )


def implicit(slices: Slices, folder: Path) -> None:
    encoded(slices, folder, ImplicitVRLittleEndian, is_little=True)


def big_endian(slices: Slices, folder: Path) -> None:
    encoded(slices, folder, ExplicitVRBigEndian, is_little=False)


def without_preamble(slices: Slices, folder: Path) -> None:
    for path in write_all(slices, folder):
        raw = path.read_bytes()
        start = 144 + int.from_bytes(raw[140:144], "little")
        path.write_bytes(raw[start:])


def huge(slice_: FileDataset) -> None:
    slice_.Rows = slice_.Columns = 60_000


def lying_codestream(slices: Slices, folder: Path) -> None:
    """Coded images are larger than their headers say."""
    for slice_ in slices:
        slice_.compress(JPEG2000Lossless, generate_instance_uid=False)
        slice_.Rows //= 2
    write_all(slices, folder)


def deflated_bomb(slices: Slices, folder: Path) -> None:
    """A file of 5 KB that expands to 4 MiB."""
    folder.mkdir()
    head = slices[0]
    head.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    raw = as_bytes(head)
    start = 144 + int.from_bytes(raw[140:144], "little")
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    data = packer.compress(bytes(2**22)) + packer.flush()
    (folder / "bomb.dcm").write_bytes(raw[:start] + data)


# Archives


def zipped(folder: Path, name: str, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(packed(files))


def packed(files: dict[str, bytes]) -> bytes:
    """Return a zip archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def files(slices: Slices, prefix: str = "study/") -> dict[str, bytes]:
    return {f"{prefix}{k}.dcm": as_bytes(slice_) for k, slice_ in enumerate(slices)}


def in_zip(slices: Slices, folder: Path) -> None:
    zipped(folder, "case.zip", files(slices))


def in_zip_in_zip(slices: Slices, folder: Path) -> None:
    zipped(folder, "case.zip", {"a/inner.zip": packed(files(slices)), "__MACOSX/a/._x": b"\0"})


def in_too_many_zips(slices: Slices, folder: Path) -> None:
    data = packed(files(slices))
    for _ in range(3):
        data = packed({"inner.zip": data})
    zipped(folder, "case.zip", {"inner.zip": data})


def in_locked_zip(slices: Slices, folder: Path) -> None:
    """Flags every member as encrypted; the bytes need not be, as none is looked at."""
    data = bytearray(packed(files(slices)))
    for magic, flags_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(magic)
        while at >= 0:
            data[at + flags_at] |= 1
            at = data.find(magic, at + 4)
    folder.mkdir()
    (folder / "case.zip").write_bytes(data)


def zip_bomb(slices: Slices, folder: Path) -> None:
    zipped(folder, "case.zip", {f"{k}.dcm": bytes(2**24) for k in range(5)})


def zip_of_a_long_directory(slices: Slices, folder: Path) -> None:
    """An end record that claims a directory of 3 GB."""
    folder.mkdir()
    record = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 3 * 10**9, 0, 0)
    (folder / "case.zip").write_bytes(record)


def in_zip_outside(slices: Slices, folder: Path) -> None:
    zipped(folder, "case.zip", files(slices, prefix="../../etc/"))


def in_zip_with_one_outside(slices: Slices, folder: Path) -> None:
    zipped(folder, "case.zip", {**files(slices), "../passwd": b"root", "/etc/x": b"x"})


def in_damaged_zip(slices: Slices, folder: Path) -> None:
    """One member's bytes are damaged."""
    data = bytearray(packed(files(slices)))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = archive.getinfo("study/10.dcm")
    middle = info.header_offset + info.compress_size // 2
    data[middle : middle + 64] = bytes(64)
    folder.mkdir()
    (folder / "case.zip").write_bytes(data)


# Folders


def empty_folder(slices: Slices, folder: Path) -> None:
    folder.mkdir()


def symlink_loop(slices: Slices, folder: Path) -> None:
    write_all(slices, folder / "study")
    (folder / "study" / "again").symlink_to(folder, target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")


def linked_twice(slices: Slices, folder: Path) -> None:
    write_all(slices, folder / "b")
    (folder / "a").symlink_to(folder / "b", target_is_directory=True)


def with_a_pipe(slices: Slices, folder: Path) -> None:
    write_all(slices, folder)
    os.mkfifo(folder / "pipe.dcm")


def foreign_files(slices: Slices, folder: Path) -> None:
    write_all(slices, folder)
    (folder / "notes.dcm").write_text("not a slice")
    (folder / "report.docx").write_bytes(b"PK\x03\x04 of another kind")
    (folder / "Thumbs.db").write_bytes(b"\0")


def nested_folders(slices: Slices, folder: Path) -> None:
    write_all(slices, folder / "a" / "b" / "c")
    (folder / "readme.txt").write_text("beside")


def renamed_copies(slices: Slices, folder: Path) -> None:
    """Two slices at different places carry one UID."""
    slices[10].SOPInstanceUID = slices[11].SOPInstanceUID
    write_all(slices, folder)
