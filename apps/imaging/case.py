"""One case on its way through a batch: where it came from, what was read, what was repaired."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from apps.imaging.reasons import Reason, Status
from apps.imaging.stack import SliceStack

if TYPE_CHECKING:
    from pydicom import Dataset


@dataclass(frozen=True, eq=False)
class Case:
    """A series as read, or why it could not be.

    Args:
        case_id: Stable over runs, from where the files lie; no identifier of a patient.
        source: Where it came from, relative to the input, such as ``study/ct.zip!/a``.
        series_uid: Of the input series; empty where there is none.
        reasons: What was repaired; for a quarantine its cause, and what was found before it.
        stack: The slices; None if quarantined.
        headers: Header of each slice without its pixels, None where a slice was filled in;
            empty where the input was not DICOM.
    """

    case_id: str
    source: str
    series_uid: str
    status: Status
    reasons: tuple[Reason, ...]
    stack: SliceStack | None
    headers: "tuple[Dataset | None, ...]" = ()

    def quarantined(self, cause: Reason) -> Self:
        """Return the case without its slices, with the cause before all other reasons."""
        reasons = (cause, *self.reasons)
        return replace(self, status=Status.QUARANTINED, reasons=reasons, stack=None, headers=())
