"""DICOM SR: its numbers and references, read back from the file."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread

from apps.imaging.outputs.settings import Kind, OutputSettings
from apps.imaging.outputs.write import write_case
from tests.apps.imaging.outputs.scan import KEY, UID_ROOT, Sample

BOTH = frozenset({Kind.SEGMENTATION, Kind.MEASUREMENTS})


@pytest.fixture
def documents(plain: Sample, tmp_path: Path) -> tuple[Dataset, Dataset]:
    """The segmentation and the measurements of it."""
    settings = OutputSettings(KEY, BOTH, keep_identity=True)
    outputs = write_case(plain.case, plain.findings, tmp_path, settings)
    return dcmread(tmp_path / outputs["segmentation"]), dcmread(tmp_path / outputs["measurements"])


def items(node: Dataset, meaning: str) -> Iterator[Dataset]:
    """Yield all content items of that name below a node."""
    for item in node.get("ContentSequence", []):
        names = item.get("ConceptNameCodeSequence")
        if names and names[0].CodeMeaning == meaning:
            yield item
        yield from items(item, meaning)


def number(item: Dataset) -> tuple[float, str]:
    measured = item.MeasuredValueSequence[0]
    return float(measured.NumericValue), measured.MeasurementUnitsCodeSequence[0].CodeValue


def test_numbers_are_those_of_the_findings(
    documents: tuple[Dataset, Dataset], plain: Sample
) -> None:
    _, report = documents
    organs = {organ.name: organ for organ in plain.findings.organs if organ.box}
    groups = list(items(report, "Measurement Group"))
    assert len(groups) == len(organs) == 6
    for group in groups:
        organ = organs.pop(next(items(group, "Tracking Identifier")).TextValue)
        assert number(next(items(group, "Volume"))) == (round(organ.volume_ml, 3), "cm3")
        attenuation = {
            next(items(item, "Derivation")).ConceptCodeSequence[0].CodeMeaning: number(item)
            for item in items(group, "Attenuation Coefficient")
        }
        assert attenuation == {
            "Mean": (round(organ.mean_hu, 3), "[hnsf'U]"),
            "Standard deviation": (round(organ.sd_hu, 3), "[hnsf'U]"),
        }
    assert not organs


def test_each_group_refers_to_its_segment_and_its_images(
    documents: tuple[Dataset, Dataset],
) -> None:
    seg, report = documents
    names = {segment.SegmentNumber: segment.SegmentLabel for segment in seg.SegmentSequence}
    frames = {
        (group.SegmentIdentificationSequence[0].ReferencedSegmentNumber, source)
        for group in seg.PerFrameFunctionalGroupsSequence
        for source in [
            group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        ]
    }
    for group in items(report, "Measurement Group"):
        reference = next(items(group, "Referenced Segment")).ReferencedSOPSequence[0]
        assert reference.ReferencedSOPInstanceUID == seg.SOPInstanceUID
        organ = next(items(group, "Tracking Identifier")).TextValue
        segment = reference.ReferencedSegmentNumber
        assert names[segment] == organ
        images = {
            item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
            for item in items(group, "Source Image for Segmentation")
        }
        assert images == {source for number, source in frames if number == segment}


def test_evidence_lists_the_segmentation_and_every_slice(
    documents: tuple[Dataset, Dataset],
) -> None:
    seg, report = documents
    evidence = {
        instance.ReferencedSOPInstanceUID
        for keyword in (
            "CurrentRequestedProcedureEvidenceSequence",
            "PertinentOtherEvidenceSequence",
        )
        for study in report.get(keyword, [])
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    }
    assert {seg.SOPInstanceUID, *(f"{UID_ROOT}.3.{k + 1}" for k in range(20))} >= evidence
    assert seg.SOPInstanceUID in evidence
    assert report.StudyInstanceUID == seg.StudyInstanceUID == f"{UID_ROOT}.1"


def test_a_lone_organ_has_its_segment_and_its_measurements(plain: Sample, tmp_path: Path) -> None:
    (mandible,) = (organ for organ in plain.findings.organs if organ.name == "Mandible")
    labels = np.where(plain.findings.labels == mandible.label, mandible.label, 0).astype(np.uint8)
    findings = replace(plain.findings, labels=labels, organs=(mandible,))
    outputs = write_case(plain.case, findings, tmp_path, OutputSettings(KEY, BOTH))
    segmentation = dcmread(tmp_path / outputs["segmentation"])
    assert {
        frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for frame in segmentation.PerFrameFunctionalGroupsSequence
    } == {1}
    report = dcmread(tmp_path / outputs["measurements"])
    (group,) = items(report, "Measurement Group")
    assert next(items(group, "Tracking Identifier")).TextValue == "Mandible"
