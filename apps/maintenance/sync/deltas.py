"""The smallest way to bring a bundle to a box that has another one, and the proof of the result.

    plain        the bundle itself; needs nothing
    zstd         compressed
    zstd_patch   compressed with the base as its dictionary
    bsdiff       difference to the base, bzip2 inside

All that apply are made and the smallest is shipped.  The result of each is compared with the
sha256 of the whole bundle, so a delta can fail but not deceive.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import bsdiff4
from backports import zstd

from apps.maintenance.sync.outcomes import Outcome, RefusedError

LEVEL = 19  # of zstd; bundles are small, and packed once for a fleet
_MIN_WINDOW_LOG, _MAX_WINDOW_LOG = 10, 27
_BSDIFF_HEADER = struct.Struct("<8sqqq")  # magic, bytes of control, of difference, of the result
_BSDIFF_MAGIC = b"BSDIFF40"


class Form(StrEnum):
    """How a bundle travels."""

    PLAIN = "plain"
    ZSTD = "zstd"
    ZSTD_PATCH = "zstd_patch"
    BSDIFF = "bsdiff"

    @property
    def needs_base(self) -> bool:
        """Whether the box must have the base."""
        return self in {Form.ZSTD_PATCH, Form.BSDIFF}


@dataclass(frozen=True, slots=True)
class Parcel:
    """A bundle in one form.

    Args:
        form: Which.
        base: sha256 of the bundle it is a difference to; empty if of none.
        data: The bytes.
    """

    form: Form
    base: str
    data: bytes


def encode(form: Form, target: bytes, base: bytes = b"") -> bytes:
    """Return a bundle in a form."""
    match form:
        case Form.PLAIN:
            return target
        case Form.ZSTD:
            return zstd.compress(target, options=_options(len(target)))
        case Form.ZSTD_PATCH:
            words = zstd.ZstdDict(base, is_raw=True).as_prefix
            return zstd.compress(target, options=_options(len(target) + len(base)), zstd_dict=words)
        case Form.BSDIFF:
            return bytes(bsdiff4.diff(base, target))


def decode(form: Form, data: bytes, base: bytes, *, length: int, sha256: str) -> bytes:
    """Return the bundle, proven.

    Args:
        form: Of ``data``.
        data: What came.
        base: The bundle it is a difference to; empty if of none.
        length: Of the bundle, as signed.
        sha256: Of the bundle, as signed.

    Raises:
        RefusedError: The result is not the bundle that was signed.
    """
    try:
        found = _decode(form, data, base, length)
    except (zstd.ZstdError, ValueError, EOFError, struct.error, OSError) as error:
        raise RefusedError(Outcome.DELTA_ALTERED, f"{form}: {error!r:.120}") from error
    if len(found) != length or hashlib.sha256(found).hexdigest() != sha256:
        detail = f"{form}: expected {length} bytes with sha256 {sha256[:12]}, got {len(found)}"
        raise RefusedError(Outcome.DELTA_ALTERED, detail)
    return found


def parcels_of(target: bytes, bases: Mapping[str, bytes]) -> list[Parcel]:
    """Return the bundle in every form that is worth serving, smallest first.

    A difference that is not smaller than the compressed bundle is left out.

    Args:
        target: The bundle.
        bases: Bundles that boxes have, by sha256.
    """
    whole = [Parcel(form, "", encode(form, target)) for form in (Form.PLAIN, Form.ZSTD)]
    least = min(len(each.data) for each in whole)
    deltas = [
        min(
            (Parcel(form, digest, encode(form, target, base)) for form in Form if form.needs_base),
            key=lambda each: len(each.data),
        )
        for digest, base in bases.items()
    ]
    useful = [each for each in deltas if len(each.data) < least]
    return sorted(whole + useful, key=lambda each: len(each.data))


def _decode(form: Form, data: bytes, base: bytes, length: int) -> bytes:
    match form:
        case Form.PLAIN:
            return data
        case Form.ZSTD:
            return _inflate(zstd.ZstdDecompressor(options=_LIMITS), data, length)
        case Form.ZSTD_PATCH:
            words = zstd.ZstdDict(base, is_raw=True).as_prefix
            return _inflate(zstd.ZstdDecompressor(words, options=_LIMITS), data, length)
        case Form.BSDIFF:
            magic, _, _, size = _BSDIFF_HEADER.unpack_from(data)
            if magic != _BSDIFF_MAGIC or size != length:
                message = f"expected a difference that makes {length} bytes, got {size}"
                raise ValueError(message)
            return bytes(bsdiff4.patch(base, data))


def _inflate(decompressor: zstd.ZstdDecompressor, data: bytes, length: int) -> bytes:
    found = decompressor.decompress(data, max_length=length + 1)  # a bomb goes no further
    if not decompressor.eof:
        message = f"expected a whole frame of {length} bytes"
        raise ValueError(message)
    return found


_LIMITS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}


def _options(num_bytes: int) -> dict[int, int]:
    window_log = math.ceil(math.log2(max(num_bytes, 2)))
    return {
        zstd.CompressionParameter.compression_level: LEVEL,
        zstd.CompressionParameter.window_log: min(
            max(window_log, _MIN_WINDOW_LOG), _MAX_WINDOW_LOG
        ),
        zstd.CompressionParameter.enable_long_distance_matching: 0,
    }
