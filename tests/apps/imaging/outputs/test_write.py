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
from tests.apps.imaging.outputs.scan import KEY, Sample


def files_below(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_every_path_is_a_file_and_every_file_has_a_name(
    any_form: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    outputs = write_case(any_form.case, any_form.findings, tmp_path, settings)
    assert set(outputs.values()) == files_below(tmp_path)
    assert {
        "report", "segmentation", "measurements", "labels", "confidence", "grid", "capture",
        "pdf", "pdf_dicom",
    } <= set(outputs)  # fmt: skip


def test_report_first_and_files_later_is_the_same_as_both(
    plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    both = write_case(plain.case, plain.findings, tmp_path / "a", settings)
    report = write_report(plain.case, plain.findings, tmp_path / "b", settings)
    files = write_files(plain.case, plain.findings, tmp_path / "b", settings)
    assert {**report, **files} == both
    for path in both.values():
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


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


def test_the_capture_is_the_picture(
    plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    outputs = write_case(plain.case, plain.findings, tmp_path, settings)
    capture = dcmread(tmp_path / outputs["capture"])
    slices = choose_slices(plain.stack, plain.findings)
    np.testing.assert_array_equal(
        capture.pixel_array, montage_of(plain.stack, plain.findings, slices)
    )
    assert capture.BurnedInAnnotation == "NO"


def test_the_pdf_in_dicom_is_the_pdf(
    plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    outputs = write_case(plain.case, plain.findings, tmp_path, settings)
    document = dcmread(tmp_path / outputs["pdf_dicom"])
    pdf = (tmp_path / outputs["pdf"]).read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert document.EncapsulatedDocument[: document.EncapsulatedDocumentLength] == pdf
    assert document.MIMETypeOfEncapsulatedDocument == "application/pdf"


def test_grid_is_json(plain: Sample, tmp_path: Path, settings: OutputSettings) -> None:
    outputs = write_case(plain.case, plain.findings, tmp_path, settings)
    record = json.loads((tmp_path / outputs["grid"]).read_text())
    assert record["notice"] == "Research use. Not a medical device."
