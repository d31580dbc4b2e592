"""The door: what it says it wrote is there, and what it cannot write it says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from apps.imaging.case import Case
from apps.imaging.outputs.errors import OutputError
from apps.imaging.outputs.montage import montage_of
from apps.imaging.outputs.selection import choose_slices
from apps.imaging.outputs.settings import Kind, OutputSettings
from apps.imaging.outputs.write import write_case, write_files, write_report
from apps.imaging.reasons import Reason, Status
from tests.apps.imaging.outputs.conftest import Written
from tests.apps.imaging.outputs.scan import KEY, Sample


def files_below(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_every_path_is_a_file_and_every_file_has_a_name(any_written: Written) -> None:
    assert set(any_written.outputs.values()) == files_below(any_written.directory)
    assert {
        "report", "segmentation", "measurements", "labels", "confidence", "grid", "capture",
        "pdf", "pdf_dicom",
    } <= set(any_written.outputs)  # fmt: skip


def test_report_first_and_files_later_is_the_same_as_both(
    written_plain: Written, plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    report = write_report(plain.case, plain.findings, tmp_path, settings)
    files = write_files(plain.case, plain.findings, tmp_path, settings)
    assert {**report, **files} == written_plain.outputs
    for path in written_plain.outputs.values():
        both = (written_plain.directory / path).read_bytes()
        assert (tmp_path / path).read_bytes() == both, path


def test_only_the_kinds_asked_for_are_written(plain: Sample, tmp_path: Path) -> None:
    settings = OutputSettings(KEY, frozenset({Kind.NIFTI}))
    write_case(plain.case, plain.findings, tmp_path, settings)
    assert files_below(tmp_path) == {"labels.nii.gz", "confidence.nii.gz", "grid.json"}


def test_a_quarantined_case_gets_its_reason_and_nothing_else(
    tmp_path: Path, settings: OutputSettings
) -> None:
    reason = Reason("TOO_FEW_SLICES", "2 slices left of 40 & <more>")
    case = Case("case-7", "x/7", "", Status.QUARANTINED, (reason,), None)
    assert write_case(case, None, tmp_path, settings) == {"report": "report.html"}
    text = (tmp_path / "report.html").read_text()
    assert files_below(tmp_path) == {"report.html"}
    assert "TOO_FEW_SLICES" in text
    assert "2 slices left of 40 &amp; &lt;more&gt;" in text
    assert "Research use. Not a medical device." in text


def test_what_did_not_come_as_dicom_gets_no_dicom_and_is_told(
    plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    case = replace(plain.case, headers=())
    outputs = write_case(case, plain.findings, tmp_path, settings)
    assert not [path for path in files_below(tmp_path) if path.endswith(".dcm")]
    assert {"report", "labels", "pdf"} <= set(outputs)
    assert "No DICOM objects" in (tmp_path / "report.html").read_text()


def test_without_organs_the_rest_is_written(
    without_organs: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    outputs = write_case(without_organs.case, without_organs.findings, tmp_path, settings)
    assert not {"segmentation", "measurements"} & set(outputs)
    assert {"report", "labels", "pdf", "capture"} <= set(outputs)
    assert "no organ was found" in (tmp_path / "report.html").read_text()


def test_slices_off_a_line_get_no_nifti_and_are_told(
    plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    origins = plain.stack.origins_mm.copy()
    origins[7, 1] += 0.5
    case = replace(plain.case, stack=replace(plain.stack, origins_mm=origins))
    outputs = write_case(case, plain.findings, tmp_path, settings)
    assert "labels" not in outputs
    assert "No NIfTI" in (tmp_path / "report.html").read_text()


def test_a_failure_names_case_and_kind_and_quotes_no_header(
    plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    strange = replace(plain.findings.organs[0], name="Sentinel^Organ")
    findings = replace(plain.findings, organs=(strange,))
    with pytest.raises(OutputError, match=r"case-0001.*segmentation.*ValueError") as caught:
        write_files(plain.case, findings, tmp_path, settings)
    assert "Sentinel" not in str(caught.value)


def test_measurements_need_the_segmentation() -> None:
    with pytest.raises(ValueError, match="segmentation"):
        OutputSettings(KEY, frozenset({Kind.MEASUREMENTS}))


def test_the_capture_is_the_picture(written_plain: Written) -> None:
    capture = dcmread(written_plain.directory / written_plain.outputs["capture"])
    stack, findings = written_plain.sample.stack, written_plain.sample.findings
    slices = choose_slices(stack, findings)
    np.testing.assert_array_equal(capture.pixel_array, montage_of(stack, findings, slices))
    assert capture.BurnedInAnnotation == "NO"


def test_the_pdf_in_dicom_is_the_pdf(written_plain: Written) -> None:
    document = dcmread(written_plain.directory / written_plain.outputs["pdf_dicom"])
    pdf = (written_plain.directory / written_plain.outputs["pdf"]).read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert document.EncapsulatedDocument[: document.EncapsulatedDocumentLength] == pdf
    assert document.MIMETypeOfEncapsulatedDocument == "application/pdf"


def test_grid_is_json(written_plain: Written) -> None:
    record = json.loads((written_plain.directory / written_plain.outputs["grid"]).read_text())
    assert record["notice"] == "Research use. Not a medical device."
