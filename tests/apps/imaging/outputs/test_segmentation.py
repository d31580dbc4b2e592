"""DICOM SEG: read back from the file and compared voxel by voxel with the label map."""

from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset, dcmread

from apps.imaging.outputs.derived import Derivation
from apps.imaging.outputs.segmentation import segmentation_of
from apps.imaging.outputs.settings import Kind, OutputSettings
from apps.imaging.outputs.write import write_case
from tests.apps.imaging.outputs.scan import KEY, UID_ROOT, Sample

SEGMENTATION = frozenset({Kind.SEGMENTATION})


def written(sample: Sample, directory: Path, *, keep_identity: bool = False) -> Dataset:
    settings = OutputSettings(KEY, SEGMENTATION, keep_identity)
    outputs = write_case(sample.case, sample.findings, directory, settings)
    return dcmread(directory / outputs["segmentation"])


def labels_by_position(seg: Dataset, sample: Sample) -> NDArray[np.uint8]:
    """Put each frame where its position says, with the label that its segment's name says."""
    label_of = {organ.name: organ.label for organ in sample.findings.organs}
    label_of_number = {s.SegmentNumber: label_of[s.SegmentLabel] for s in seg.SegmentSequence}
    labels = np.zeros_like(sample.findings.labels)
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for pixels, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        distance = np.linalg.norm(sample.stack.origins_mm - place, axis=1)
        assert distance.min() < 1e-3
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        labels[distance.argmin()][pixels > 0] = label_of_number[number]
    return labels


def test_every_acquired_voxel_comes_back(any_form: Sample, tmp_path: Path) -> None:
    seg = written(any_form, tmp_path)
    expected = any_form.findings.labels.copy()
    expected[any_form.stack.is_interpolated] = 0
    np.testing.assert_array_equal(labels_by_position(seg, any_form), expected)


def test_highdicom_finds_the_same_by_source_image(any_form: Sample, tmp_path: Path) -> None:
    written(any_form, tmp_path, keep_identity=True)
    seg = highdicom.seg.segread(tmp_path / "segmentation.dcm")
    acquired = [k for k, header in enumerate(any_form.case.headers) if header is not None]
    pixels = seg.get_pixels_by_source_instance(
        [f"{UID_ROOT}.3.{k + 1}" for k in acquired],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    label_of = {organ.name: organ.label for organ in any_form.findings.organs}
    names = [seg.get_segment_description(n).segment_label for n in seg.segment_numbers]
    table = np.array([0, *(label_of[name] for name in names)])
    np.testing.assert_array_equal(table[pixels], any_form.findings.labels[acquired])


def test_frames_lie_in_the_plane_of_the_slices(tilted: Sample, tmp_path: Path) -> None:
    shared = written(tilted, tmp_path).SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    expected = [1, 0, 0, 0, np.cos(np.radians(18.5)), np.sin(np.radians(18.5))]
    np.testing.assert_allclose(orientation, expected, atol=1e-5)
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == [1.6, 1.2]


def test_no_frame_refers_to_a_slice_that_was_filled_in(filled: Sample, tmp_path: Path) -> None:
    seg = written(filled, tmp_path, keep_identity=True)
    sources = {
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        for group in seg.PerFrameFunctionalGroupsSequence
    }
    assert sources <= {h.SOPInstanceUID for h in filled.case.headers if h is not None}
    assert not {f"{UID_ROOT}.3.10", f"{UID_ROOT}.3.11"} & sources
    assert (filled.findings.labels[9] > 0).any()


def test_series_and_instances_are_referenced(plain: Sample, tmp_path: Path) -> None:
    seg = written(plain, tmp_path, keep_identity=True)
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == f"{UID_ROOT}.2"
    referenced = [i.ReferencedSOPInstanceUID for i in series.ReferencedInstanceSequence]
    assert referenced == [f"{UID_ROOT}.3.{k + 1}" for k in range(20)]
    assert seg.StudyInstanceUID == f"{UID_ROOT}.1"
    assert seg.FrameOfReferenceUID == f"{UID_ROOT}.4"
    assert seg.SeriesInstanceUID != series.SeriesInstanceUID


def test_organs_have_codes_and_parotids_a_side(plain: Sample, tmp_path: Path) -> None:
    segments = {s.SegmentLabel: s for s in written(plain, tmp_path).SegmentSequence}
    codes = {
        name: segment.SegmentedPropertyTypeCodeSequence[0].CodeValue
        for name, segment in segments.items()
    }
    assert codes == {
        "Brainstem": "15926001",
        "SpinalCord": "2748008",
        "RightParotid": "45289007",
        "LeftParotid": "45289007",
        "Esophagus": "32849002",
        "Mandible": "91609006",
    }
    sides = {
        name: kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning
        for name, segment in segments.items()
        if "SegmentedPropertyTypeModifierCodeSequence"
        in (kind := segment.SegmentedPropertyTypeCodeSequence[0])
    }
    assert sides == {"RightParotid": "Right", "LeftParotid": "Left"}
    algorithm = segments["Mandible"].SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmVersion == "organs-test-1"
    stored = segments["LeftParotid"].RecommendedDisplayCIELabValue
    shown = highdicom.color.CIELabColor.from_dicom_value(stored).to_rgb(clip=True)
    np.testing.assert_allclose(shown, (230, 159, 0), atol=3)


def test_an_organ_without_voxels_has_no_segment(plain: Sample, tmp_path: Path) -> None:
    seg = written(plain, tmp_path)
    assert "Larynx" not in [segment.SegmentLabel for segment in seg.SegmentSequence]
    assert [segment.SegmentNumber for segment in seg.SegmentSequence] == [1, 2, 3, 4, 5, 6]


def test_without_organs_there_is_no_segmentation(
    without_organs: Sample, settings: OutputSettings
) -> None:
    assert (
        segmentation_of(Derivation(without_organs.case, without_organs.findings, settings)) is None
    )


def test_each_frame_has_the_thickness_of_its_own_slice(uneven: Sample, tmp_path: Path) -> None:
    for index, header in enumerate(uneven.case.headers):
        assert header is not None
        header.SliceThickness = 4.0 if index < 10 else 7.0
    seg = written(uneven, tmp_path, keep_identity=True)
    thickness = {
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID: float(
            group.PixelMeasuresSequence[0].SliceThickness
        )
        for group in seg.PerFrameFunctionalGroupsSequence
    }
    for uid, mm in thickness.items():
        assert mm == (4.0 if int(uid.rsplit(".", 1)[1]) <= 10 else 7.0)
    assert set(thickness.values()) == {4.0, 7.0}


def test_writing_again_gives_the_same_object_and_other_findings_another(
    plain: Sample, tmp_path: Path, other_findings: Sample
) -> None:
    first = written(plain, tmp_path / "a")
    assert written(plain, tmp_path / "b").SOPInstanceUID == first.SOPInstanceUID
    assert written(other_findings, tmp_path / "c").SOPInstanceUID != first.SOPInstanceUID


def test_an_organ_without_a_code_is_named(plain: Sample, settings: OutputSettings) -> None:
    strange = replace(plain.findings.organs[0], name="Appendix")
    findings = replace(plain.findings, organs=(strange,))
    with pytest.raises(ValueError, match="Appendix"):
        segmentation_of(Derivation(plain.case, findings, settings))
