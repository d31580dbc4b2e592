"""DICOM SEG: one binary segment per organ found, on the slices as they were acquired.

BINARY, not LABELMAP: a viewer that shows SEG at all shows this one.  Frames exist only where
an organ has voxels on an acquired slice; what the model said of a filled-in slice stays in the
NIfTI label map, since a SEG frame must lie where an image of the series lies.  Organs without
such voxels have no segment, and segments are numbered from 1 in the order of labels.
"""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
from highdicom import AlgorithmIdentificationSequence, PixelMeasuresSequence
from highdicom.color import CIELabColor
from highdicom.seg import (
    SegmentAlgorithmTypeValues,
    Segmentation,
    SegmentationTypeValues,
    SegmentDescription,
)
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sr.codedict import codes

from apps.imaging.finding import Organ
from apps.imaging.outputs.anatomy import CATEGORY, anatomy_of
from apps.imaging.outputs.derived import LONG_STRING, MAKER, Derivation
from apps.imaging.outputs.settings import Kind


def segmented_organs(derivation: Derivation) -> tuple[Organ, ...]:
    """Return the organs that get a segment, in the order of segment numbers from 1."""
    acquired = np.zeros(derivation.stack.num_slices, dtype=np.bool_)
    acquired[list(derivation.acquired)] = True
    organs = (o for o in derivation.findings.organs if _is_on(o, derivation, acquired))
    return tuple(sorted(organs, key=lambda organ: organ.label))


def segmentation_of(derivation: Derivation) -> Segmentation | None:
    """Return the segmentation, or None if no organ has a voxel on an acquired slice.

    Raises:
        ValueError: An organ has no code, or the case did not come as DICOM.
    """
    organs = segmented_organs(derivation)
    if not organs:
        return None
    segment_of_label = np.zeros(256, dtype=np.uint8)
    segment_of_label[[organ.label for organ in organs]] = np.arange(1, len(organs) + 1)
    thickness_mm = _thickness_mm(derivation)
    segmentation = Segmentation(
        source_images=derivation.references,
        pixel_array=segment_of_label[derivation.findings.labels[list(derivation.acquired)]],
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _description(organ, number, derivation) for number, organ in enumerate(organs, 1)
        ],
        pixel_measures=PixelMeasuresSequence(
            pixel_spacing=derivation.stack.pixel_mm, slice_thickness=float(thickness_mm.min())
        ),
        content_label="ORGANS",
        content_description="Organs at risk, by a model; research use",
        **derivation.identity(Kind.SEGMENTATION),
    )
    if thickness_mm.min() != thickness_mm.max():
        _spread_thickness(segmentation, derivation.references, thickness_mm)
    _identify_frames(segmentation)
    _name_dimensions(segmentation, derivation.uid("dimensions"))
    derivation.finish(segmentation)
    return segmentation


def _is_on(organ: Organ, derivation: Derivation, acquired: NDArray[np.bool_]) -> bool:
    if organ.box is None:
        return False
    first, row, column, last, row_end, column_end = organ.box
    block = derivation.findings.labels[first:last, row:row_end, column:column_end]
    return bool((block[acquired[first:last]] == organ.label).any())


def _description(organ: Organ, number: int, derivation: Derivation) -> SegmentDescription:
    anatomy = anatomy_of(organ.name)
    description = SegmentDescription(
        segment_number=number,
        segment_label=organ.name,
        segmented_property_category=CATEGORY,
        segmented_property_type=anatomy.code,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=MAKER,
            family=codes.cid7162.ArtificialIntelligence,
            version=derivation.findings.model_version[:LONG_STRING],
        ),
        tracking_id=organ.name,
        tracking_uid=derivation.uid("organ", organ.name),
        display_color=CIELabColor.from_rgb(*anatomy.colour),
    )
    if anatomy.laterality is not None:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        modifier = CodedConcept.from_code(anatomy.laterality)
        kind.SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return description


def _identify_frames(segmentation: Segmentation) -> None:
    """Let each frame name its segment; highdicom names a lone one once for all, and misses it."""
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    if "SegmentIdentificationSequence" not in shared:
        return
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        frame.SegmentIdentificationSequence = deepcopy(shared.SegmentIdentificationSequence)
    del shared.SegmentIdentificationSequence


def _name_dimensions(segmentation: Segmentation, uid: str) -> None:
    """Replace the random UID of the dimensions, so that the same case gives the same bytes."""
    named = (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence)
    for item in named:
        item.DimensionOrganizationUID = uid


def _thickness_mm(derivation: Derivation) -> NDArray[np.float64]:
    """Return the nominal thickness of each acquired slice, the median step where it is unsaid."""
    steps_mm = np.diff(derivation.stack.positions_mm)
    usual_mm = float(np.median(steps_mm)) if steps_mm.size else 1.0
    said = [header.SliceThickness for header in derivation.references]
    return np.array([float(value) if value else usual_mm for value in said])


def _spread_thickness(
    segmentation: Segmentation, references: Sequence[Dataset], thickness_mm: NDArray[np.float64]
) -> None:
    """Give each frame the thickness of its own slice, where slices differ."""
    of_source = {
        reference.SOPInstanceUID: float(mm)
        for reference, mm in zip(references, thickness_mm, strict=True)
    }
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    del shared.PixelMeasuresSequence
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        frame.PixelMeasuresSequence = PixelMeasuresSequence(
            pixel_spacing=spacing, slice_thickness=of_source[source]
        )
