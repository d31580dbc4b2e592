"""De-identification of everything that is written, on unless a site switches it off.

Rules, after the Basic Application Level Confidentiality Profile (DICOM PS3.15, annex E):
    1. Allow-list: of a source header only what ``reference_headers`` names goes on.  Whatever
       else it holds (names, dates, institution, free text, private elements) stays behind.
    2. Places come from the stack, not from the headers.
    3. UIDs are replaced by a keyed hash, so references inside the outputs, and to a source
       whose UIDs were replaced with the same key, agree.
    4. The patient is a pseudonym, the same for the same patient; dates and times are
       removed, or a dummy where the standard wants a value.
    5. With ``keep_identity`` the UIDs stay, and patient and study are copied at the very end
       from ``IDENTITY_KEYWORDS``, so that no library in between can quote them in a log.

Not covered: pixels.  Outputs hold axial and coronal views, labels and confidence, never the
CT as a volume, and no sagittal view, which would show a profile.

dicognito was considered: it cleans whole files by a list of what to remove, and keeps private
elements and descriptions; derived objects need a dozen attributes, so naming these is shorter
and safer.
"""

import hmac
import uuid
from collections.abc import Sequence

import numpy as np
from highdicom.sr import CodedConcept
from pydicom import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import CTImageStorage

from apps.imaging.case import Case
from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.stack import SliceStack

TECHNICAL_KEYWORDS = (  # say how pixels were stored, nothing of a person
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
EMPTY_KEYWORDS = (  # must be there, may be empty (type 2)
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
IDENTITY_KEYWORDS = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
    "ReferringPhysicianName",
)
DECIMALS = 8  # of places and directions; a decimal string has 16 characters
DUMMIES = {"DA": "19000101", "TM": "000000", "DT": "19000101000000"}
METHOD = ("Attributes by allow-list", "UIDs and patient by keyed hash", "Dates and times removed")
PROFILE = Code("113100", "DCM", "Basic Application Confidentiality Profile")


class Pseudonyms:
    """Replacements by keyed hash: the same for the same original, linked to it only by the key.

    Args:
        settings: Holds the key, and whether originals are kept.
    """

    def __init__(self, settings: OutputSettings) -> None:
        self._key = settings.uid_key
        self._keep = settings.keep_identity

    def uid(self, original: str) -> str:
        """Return the UID to write in place of one of the source."""
        return original if self._keep else self.derived_uid("source", original)

    def derived_uid(self, *parts: str) -> str:
        """Return the UID of something new that is named by its parts."""
        value = uuid.UUID(bytes=self._digest("uid", *parts)[:16], version=5)
        return f"2.25.{value.int}"  # PS3.5, B.2

    def patient(self, patient_id: str) -> str:
        """Return a pseudonym for a patient."""
        return f"P-{self._digest('patient', patient_id).hex()[:12]}"

    def _digest(self, *parts: str) -> bytes:
        message = b"".join(len(part.encode()).to_bytes(4) + part.encode() for part in parts)
        return hmac.digest(self._key, message, "sha256")


def reference_headers(case: Case, settings: OutputSettings) -> tuple[Dataset | None, ...]:
    """Return for each slice a header that may be told: what it is and where it lies.

    Nothing of the patient is in them in either mode, only UIDs of the source if these are kept.

    Args:
        case: With a stack, and headers for the slices that were acquired.
        settings: Hold the key, and say whether UIDs stay.

    Returns:
        One for each slice; None for a slice that was filled in.

    Raises:
        ValueError: The case has no stack, or not one header per slice.
    """
    stack = case.stack
    if stack is None or len(case.headers) != stack.num_slices:
        num = 0 if stack is None else stack.num_slices
        message = f"case {case.case_id}: expected a header or None for each of {num} slices, got "
        raise ValueError(message + f"{len(case.headers)}; write DICOM only of what came as DICOM")
    pseudonyms = Pseudonyms(settings)
    first = next((header for header in case.headers if header is not None), None)
    shared = _shared(case, first or Dataset(), pseudonyms)
    return tuple(
        None
        if header is None or stack.is_interpolated[index]
        else _reference(shared, header, stack, index, pseudonyms)
        for index, header in enumerate(case.headers)
    )


def finish(dataset: Dataset, case: Case, settings: OutputSettings) -> None:
    """Mark a derived object as de-identified, or give it patient and study of its source."""
    if settings.keep_identity:
        source = next((header for header in case.headers if header is not None), Dataset())
        for keyword in IDENTITY_KEYWORDS:
            if keyword in source:
                dataset[keyword] = source[keyword]
        return
    for element in dataset.iterall():  # highdicom says in a sequence when it was at work
        if element.VR in DUMMIES and element.value:
            element.value = DUMMIES[element.VR]
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = list(METHOD)
    dataset.DeidentificationMethodCodeSequence = [CodedConcept.from_code(PROFILE)]
    dataset.LongitudinalTemporalInformationModified = "REMOVED"


def _shared(case: Case, first: Dataset, pseudonyms: Pseudonyms) -> Dataset:
    """Return what all slices of a series have in common."""
    series = str(first.get("SeriesInstanceUID") or case.series_uid or case.case_id)
    shared = Dataset()
    for keyword in EMPTY_KEYWORDS:
        setattr(shared, keyword, "")
    shared.PatientID = pseudonyms.patient(str(first.get("PatientID") or series))
    shared.PatientName = f"{shared.PatientID}^"
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        original = first.get(keyword)
        uid = pseudonyms.uid(str(original)) if original else pseudonyms.derived_uid(keyword, series)
        setattr(shared, keyword, uid)
    shared.Modality = "CT"
    return shared


def _reference(
    shared: Dataset, header: Dataset, stack: SliceStack, index: int, pseudonyms: Pseudonyms
) -> Dataset:
    """Return the header of one slice: what all have, and what it is and where it lies."""
    reference = Dataset()
    reference.update(shared)
    original = header.get("SOPInstanceUID")
    reference.SOPClassUID = header.get("SOPClassUID") or CTImageStorage
    reference.SOPInstanceUID = (
        pseudonyms.uid(str(original))
        if original
        else pseudonyms.derived_uid("slice", str(shared.SeriesInstanceUID), str(index))
    )
    reference.Rows, reference.Columns = stack.hu.shape[1:]
    reference.ImagePositionPatient = _decimals(stack.origins_mm[index])
    reference.ImageOrientationPatient = _decimals([*stack.row_axis, *stack.column_axis])
    reference.PixelSpacing = _decimals(stack.pixel_mm)
    reference.SliceThickness = header.get("SliceThickness")
    for keyword in TECHNICAL_KEYWORDS:
        if keyword in header:
            reference[keyword] = header[keyword]
    return reference


def _decimals(values: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(value), DECIMALS) for value in values]
