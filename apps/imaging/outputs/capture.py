"""Secondary capture: the overlay montage as a DICOM image, for viewers without SEG."""

from highdicom.sc import SCImage
from pydicom.uid import ExplicitVRLittleEndian

from apps.imaging.outputs.derived import Derivation
from apps.imaging.outputs.orientation import letter_of
from apps.imaging.outputs.overlay import Rgb
from apps.imaging.outputs.settings import Kind


def capture_of(derivation: Derivation, montage: Rgb) -> SCImage:
    """Return a montage as a DICOM image of the case's study.

    Args:
        derivation: Of the case.
        montage: Picture with its captions, uint8 [height, width, 3].
    """
    capture = SCImage(
        pixel_array=montage,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=(
            letter_of(derivation.stack.row_axis),
            letter_of(derivation.stack.column_axis),
        ),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **derivation.patient_and_study(),
        **derivation.identity(Kind.CAPTURE),
    )
    capture.BodyPartExamined = "HEADNECK"  # of the task; not paired, so without a laterality
    capture.BurnedInAnnotation = "NO"  # captions name no patient
    derivation.finish(capture)
    return capture
