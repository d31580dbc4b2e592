"""DICOM SR, template TID 1500: volume and Hounsfield units of each organ that has a segment.

The numbers are those of the findings, with the digits that make sense; each group refers to its
segment of the segmentation, and through it to the images.
"""

from collections.abc import Sequence
from typing import Any

from highdicom import sr
from highdicom.seg import Segmentation
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from apps.imaging.finding import Organ
from apps.imaging.outputs.anatomy import CATEGORY, anatomy_of
from apps.imaging.outputs.derived import LONG_STRING, MAKER, MODEL_NAME, Derivation
from apps.imaging.outputs.segmentation import segmented_organs
from apps.imaging.outputs.settings import Kind

VOLUME = Code("118565006", "SCT", "Volume")
ATTENUATION = Code("112031", "DCM", "Attenuation Coefficient")
MEAN = Code("373098007", "SCT", "Mean")
DEVIATION = Code("386136009", "SCT", "Standard deviation")
CUBIC_CENTIMETRE = Code("cm3", "UCUM", "Cubic centimeter")
HOUNSFIELD = Code("[hnsf'U]", "UCUM", "Hounsfield unit")
DIGITS = 3  # after the point: a microlitre, a thousandth of a Hounsfield unit


def measurements_of(derivation: Derivation, segmentation: Segmentation) -> sr.Comprehensive3DSR:
    """Return the measurements of the segments of a segmentation.

    Args:
        derivation: That it was made of.
        segmentation: Of the same case, with at least one segment.
    """
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(
                observer_type=codes.DCM.Device,
                observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
                    uid=derivation.uid("device"), name=MAKER, model_name=MODEL_NAME
                ),
            )
        ),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=[
            _group(organ, number, derivation, segmentation)
            for number, organ in enumerate(segmented_organs(derivation), 1)
        ],
        title=codes.DCM.ImagingMeasurementReport,
    )
    document = sr.Comprehensive3DSR(
        evidence=[segmentation, *derivation.references],
        content=report,
        is_complete=True,
        is_final=False,
        is_verified=False,
        **_identity(derivation),
    )
    derivation.finish(document)
    return document


def _identity(derivation: Derivation) -> dict[str, Any]:
    return dict(derivation.identity(Kind.MEASUREMENTS))


def _group(
    organ: Organ, number: int, derivation: Derivation, segmentation: Segmentation
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    anatomy = anatomy_of(organ.name)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=derivation.uid("organ", organ.name), identifier=organ.name
        ),
        referenced_segment=sr.ReferencedSegment.from_segmentation(segmentation, number),
        finding_category=CATEGORY,
        finding_type=anatomy.code,
        finding_sites=[
            sr.FindingSite(anatomic_location=anatomy.code, laterality=anatomy.laterality)
        ],
        algorithm_id=sr.AlgorithmIdentification(
            name=MAKER, version=derivation.findings.model_version[:LONG_STRING]
        ),
        measurements=_measurements(organ),
    )


def _measurements(organ: Organ) -> Sequence[sr.Measurement]:
    return [
        sr.Measurement(name=VOLUME, value=round(organ.volume_ml, DIGITS), unit=CUBIC_CENTIMETRE),
        *(
            sr.Measurement(
                name=ATTENUATION, value=round(value, DIGITS), unit=HOUNSFIELD, derivation=kind
            )
            for value, kind in ((organ.mean_hu, MEAN), (organ.sd_hu, DEVIATION))
        ),
    ]
