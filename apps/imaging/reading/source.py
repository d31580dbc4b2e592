"""What an input holds before it is read: where cases lie, and what belongs to none.

All of it is small and can be pickled, so that workers read cases by themselves.
Labels and paths may hold names of patients: they are for whoever owns the input, and are
never logged.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from apps.imaging.reasons import Reason

CASE_ID_DIGITS = 16


class RejectedError(Exception):
    """An input, or one file of it, cannot be used.

    Args:
        code: See ``Reason``.
        detail: Likewise; nothing that identifies a patient.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.reason = Reason(code, detail)

    def __reduce__(self) -> tuple[type["RejectedError"], tuple[str, str]]:
        return type(self), (self.reason.code, self.reason.detail)


def reason_of(error: Exception) -> Reason:
    """Return why a file is set aside after any error in reading it."""
    if isinstance(error, RejectedError):
        return error.reason
    detail = f"expected a readable file, reading it failed by {type(error).__name__}"
    return Reason("FILE_UNREADABLE", detail)


class SourceKind(StrEnum):
    """How a source is read."""

    DICOM = "dicom"
    NIFTI = "nifti"
    NOTHING = "nothing"  # a place without a usable series: its reasons say why


@dataclass(frozen=True, slots=True)
class Member:
    """A file, on disk or in an archive.

    Args:
        path: On disk.
        inside: If that is an archive, the member in it; if that is one too, the member of
            that, and so on.
    """

    path: Path
    inside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its own name, without folders."""
        return self.inside[-1].rsplit("/", 1)[-1] if self.inside else self.path.name


@dataclass(frozen=True, slots=True)
class Source:
    """One case to be read.

    Args:
        case_id: The same over runs, from the place and the series; reveals neither.
        label: Place relative to the input, such as ``study/ct.zip!/a``.
        series_uid: Of the input series; empty where there is none.
        kind: How it is read.
        members: Its files.
        reasons: What is known before reading; of a place without a series, why.
    """

    case_id: str
    label: str
    series_uid: str
    kind: SourceKind
    members: tuple[Member, ...]
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class SetAside:
    """A file that belongs to no case.

    Args:
        label: Its place and name relative to the input.
        reason: Why.
    """

    label: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Inventory:
    """All an input holds, in a stable order.

    Args:
        sources: One for each case.
        set_aside: Files of no case.
    """

    sources: tuple[Source, ...]
    set_aside: tuple[SetAside, ...]


def case_id_of(label: str, series_uid: str, part: str = "") -> str:
    """Return the id of a case.

    Args:
        label: Place relative to the input.
        series_uid: Of the series.
        part: Which part of the series, if it holds several acquisitions.
    """
    text = "\0".join((label, series_uid, part))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:CASE_ID_DIGITS]
