"""Which outputs are written, and whether they may say who the patient is."""

from dataclasses import dataclass, field
from enum import StrEnum

MIN_KEY_BYTES = 16  # below that a keyed hash can be searched through


class Kind(StrEnum):
    """A kind of output of one case."""

    REPORT = "report"
    OVERLAYS = "overlays"
    SEGMENTATION = "segmentation"
    MEASUREMENTS = "measurements"
    NIFTI = "nifti"
    CAPTURE = "capture"
    PDF = "pdf"


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """What to write of each case.

    Args:
        uid_key: Secret of the site, at least 16 bytes.  The same key gives the same new UIDs
            and pseudonyms in every run; without it nobody can tell which source they stand for.
        kinds: What is written; the report alone is fast.
        keep_identity: Write patient, study and original UIDs into DICOM objects, so that a
            site's own PACS files them with the series, and name the source in reports.

    Raises:
        ValueError: The key is too short, or measurements are asked for without the
            segmentation that they refer to.
    """

    uid_key: bytes = field(repr=False)
    kinds: frozenset[Kind] = frozenset(Kind)
    keep_identity: bool = False

    def __post_init__(self) -> None:
        if len(self.uid_key) < MIN_KEY_BYTES:
            message = f"expected a uid_key of {MIN_KEY_BYTES} bytes or more, "
            raise ValueError(message + f"got {len(self.uid_key)}; take secrets.token_bytes(32)")
        if Kind.MEASUREMENTS in self.kinds and Kind.SEGMENTATION not in self.kinds:
            message = "expected the segmentation beside the measurements, which refer to it; "
            raise ValueError(message + "add it to kinds, or leave the measurements out")
