"""The stored values of a DICOM image; never more of them than its header was allowed to say.

Covered: native little and big endian, and what pydicom's decoders read (RLE, JPEG, JPEG-LS,
JPEG 2000).  A compressed frame is decoded only if its own header states the size the image
has.  Not covered: colour, packed bits.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import FileDataset
from pydicom.encaps import generate_frames
from pydicom.uid import RLELossless

from apps.imaging.reading.decoder import PLUGINS, Decoder
from apps.imaging.reading.headers import text_of, whole_number
from apps.imaging.reading.source import RejectedError

NATIVE = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"})
DEFLATED = "1.2.840.10008.1.2.1.99"
PIXEL_TAG = {True: b"\xe0\x7f\x10\x00", False: b"\x7f\xe0\x00\x10"}  # by little endian
BITS = (8, 16)

J2K_START = b"\xff\x4f\xff\x51"  # start of codestream, then its size
JPEG_START = b"\xff\xd8"
JPEG_SIZE_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, slots=True)
class _Layout:
    num_frames: int
    rows: int
    columns: int
    dtype: np.dtype[np.integer]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_frames, self.rows, self.columns

    @property
    def num_bytes(self) -> int:
        return self.num_frames * self.rows * self.columns * self.dtype.itemsize


def stored_pixels(
    raw: bytes, pixels_at: int, header: FileDataset, decoder: Decoder
) -> NDArray[np.integer]:
    """Return the stored values of a file, integers [frames, rows, columns].

    Args:
        raw: The file.
        pixels_at: Where the pixel data element begins in it.
        header: Of it; its sizes are within bounds.
        decoder: For compressed ones.

    Raises:
        RejectedError: The file ends early, or its pixels cannot be read.
    """
    syntax = text_of(header.file_meta, "TransferSyntaxUID")
    layout = _layout_of(header)
    if syntax in NATIVE or not syntax:
        return _native(raw, pixels_at, header, layout)
    if syntax not in PLUGINS and syntax != DEFLATED:
        raise RejectedError("PIXELS_UNSUPPORTED", "expected a known transfer syntax, got another")
    try:
        if syntax == DEFLATED:
            return _inflated(raw, layout)
        return _decoded(raw, syntax, layout, decoder)
    except RejectedError:
        raise
    except Exception as error:  # noqa: BLE001 - pydicom raises of every kind on broken files
        detail = f"expected readable pixels, decoding failed by {type(error).__name__}"
        raise RejectedError("PIXELS_UNREADABLE", detail) from None


def _layout_of(header: FileDataset) -> _Layout:
    bits = whole_number(header, "BitsAllocated", 0)
    samples = whole_number(header, "SamplesPerPixel", 1)
    if bits not in BITS or samples != 1:
        detail = f"expected 1 sample of 8 or 16 bits, got {samples} of {bits}"
        raise RejectedError("PIXELS_UNSUPPORTED", detail)
    kind = "i" if whole_number(header, "PixelRepresentation", 0) else "u"
    order = ">" if header.original_encoding[1] is False else "<"
    return _Layout(
        whole_number(header, "NumberOfFrames", 1),
        whole_number(header, "Rows", 0),
        whole_number(header, "Columns", 0),
        np.dtype(f"{order}{kind}{bits // 8}"),
    )


def _native(
    raw: bytes, pixels_at: int, header: FileDataset, layout: _Layout
) -> NDArray[np.integer]:
    is_implicit, is_little = header.original_encoding
    head = raw[pixels_at : pixels_at + 12]
    if head[:4] != PIXEL_TAG[is_little is not False]:
        raise RejectedError("FILE_TRUNCATED", "expected pixels behind the header, there are none")
    start = pixels_at + (8 if is_implicit else 12)
    if start + layout.num_bytes > len(raw):
        detail = f"expected {layout.num_bytes} bytes of pixels, got {max(0, len(raw) - start)}"
        raise RejectedError("FILE_TRUNCATED", detail)
    stated = int.from_bytes(raw[start - 4 : start], "big" if is_little is False else "little")
    if not layout.num_bytes <= stated < 2**32 - 1:
        detail = f"expected {layout.num_bytes} bytes of pixels, the file states {stated}"
        raise RejectedError("PIXELS_UNREADABLE", detail)
    count = layout.num_bytes // layout.dtype.itemsize
    return np.frombuffer(raw, layout.dtype, count, start).reshape(layout.shape)


def _inflated(raw: bytes, layout: _Layout) -> NDArray[np.integer]:
    """Return the pixels of a deflated file, which is known to expand within bounds."""
    pixels = pydicom.dcmread(io.BytesIO(raw), force=True).pixel_array
    return np.asarray(pixels).reshape(layout.shape)


def _decoded(raw: bytes, syntax: str, layout: _Layout, decoder: Decoder) -> NDArray[np.integer]:
    dataset = pydicom.dcmread(io.BytesIO(raw), force=True)
    _check_coded(dataset.PixelData, syntax, layout)
    pixels = decoder.decode(raw, syntax)
    if pixels.size != layout.num_frames * layout.rows * layout.columns:
        detail = f"expected {layout.shape} pixels, got {pixels.shape}"
        raise RejectedError("PIXELS_UNREADABLE", detail)
    return pixels.reshape(layout.shape)


def _check_coded(data: bytes, syntax: str, layout: _Layout) -> None:
    for frame in generate_frames(data, number_of_frames=layout.num_frames):
        coded = (layout.rows, layout.columns) if syntax == RLELossless else coded_shape(frame)
        if coded != (layout.rows, layout.columns):
            detail = f"expected a coded image of {layout.rows} x {layout.columns}, got {coded}"
            raise RejectedError("PIXELS_UNREADABLE", detail)


def coded_shape(frame: bytes) -> tuple[int, int] | None:
    """Return rows and columns that a JPEG, JPEG-LS or JPEG 2000 image itself states.

    Source:
        ITU-T T.81 B.2.2 and T.87 C.2.2 (frame header), T.800 A.5.1 (SIZ).
    """
    at = frame.find(J2K_START, 0, 256)
    if at >= 0 and len(frame) >= at + 24:
        right, bottom, left, top = struct.unpack_from(">4I", frame, at + 8)
        return bottom - top, right - left
    at = 2 if frame.startswith(JPEG_START) else len(frame)
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        if frame[at + 1] in JPEG_SIZE_MARKERS:
            rows, columns = struct.unpack_from(">2H", frame, at + 5)
            return rows, columns
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
