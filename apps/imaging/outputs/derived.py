"""What all DICOM objects made of one case share: who made them, what they refer to, UIDs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

from pydicom import Dataset

from apps.imaging.case import Case
from apps.imaging.finding import Findings
from apps.imaging.outputs.deidentify import Pseudonyms, finish, reference_headers
from apps.imaging.outputs.settings import Kind, OutputSettings
from apps.imaging.stack import SliceStack

MAKER = "trimoe"
MODEL_NAME = "trimoe imaging"
NOTICE = "Research use. Not a medical device."
LONG_STRING = 64  # characters of VR LO
SERIES_NUMBERS = {
    Kind.SEGMENTATION: 9001,
    Kind.MEASUREMENTS: 9002,
    Kind.CAPTURE: 9003,
    Kind.PDF: 9004,
}
DESCRIPTIONS = {
    Kind.SEGMENTATION: "Organs (research use)",
    Kind.MEASUREMENTS: "Organ measurements (research use)",
    Kind.CAPTURE: "Organ overlay (research use)",
    Kind.PDF: "Organ report (research use)",
}


@dataclass(frozen=True, eq=False)
class Derivation:
    """A case that DICOM objects are derived from.

    UIDs of new objects follow from the key, the series, the model and what it found: writing
    the same again gives the same object, and anything else another.

    Args:
        case: Came as DICOM, with a stack.
        findings: Of the model, on its grid.
        settings: Of the outputs.
    """

    case: Case
    findings: Findings
    settings: OutputSettings

    @cached_property
    def stack(self) -> SliceStack:
        """Slices of the case.

        Raises:
            ValueError: It has none.
        """
        if self.case.stack is None:
            message = f"case {self.case.case_id}: expected slices, got none; it is in quarantine"
            raise ValueError(message)
        return self.case.stack

    @cached_property
    def headers(self) -> tuple[Dataset | None, ...]:
        """Of each slice, de-identified as the settings say; None where it was filled in."""
        return reference_headers(self.case, self.settings)

    @cached_property
    def acquired(self) -> tuple[int, ...]:
        """Indices of the slices that were acquired."""
        is_filled = self.stack.is_interpolated
        return tuple(
            index
            for index, header in enumerate(self.case.headers)
            if header is not None and not is_filled[index]
        )

    @property
    def references(self) -> list[Dataset]:
        """Headers of the acquired slices, in order."""
        return [header for header in self.headers if header is not None]

    def uid(self, *parts: str) -> str:
        """Return the UID of a part of what is derived."""
        series = str(self.references[0].SeriesInstanceUID)
        content = (self.findings.model_version, repr(self.findings.organs))
        return Pseudonyms(self.settings).derived_uid(series, *content, *parts)

    def identity(self, kind: Kind) -> Mapping[str, Any]:
        """Return who an object of a kind is and who made it, as highdicom's arguments."""
        return {
            "series_instance_uid": self.uid(kind, "series"),
            "series_number": SERIES_NUMBERS[kind],
            "sop_instance_uid": self.uid(kind, "instance"),
            "instance_number": 1,
            "manufacturer": MAKER,
            "manufacturer_model_name": MODEL_NAME,
            "software_versions": [version("trimoe"), self.findings.model_version[:LONG_STRING]],
            "device_serial_number": MAKER,
            "series_description": DESCRIPTIONS[kind],
        }

    def patient_and_study(self) -> Mapping[str, Any]:
        """Return patient and study, as highdicom's arguments."""
        first = self.references[0]
        return {
            "study_instance_uid": first.StudyInstanceUID,
            "patient_id": first.PatientID,
            "patient_name": first.PatientName,
            "patient_birth_date": "",
            "patient_sex": "",
            "accession_number": "",
            "study_id": "",
            "study_date": None,
            "study_time": None,
            "referring_physician_name": "",
        }

    def finish(self, dataset: Dataset) -> None:
        """Mark as de-identified, or give back patient and study, as the settings say."""
        finish(dataset, self.case, self.settings)
