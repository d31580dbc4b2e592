"""Nothing of the patient in any byte of any file, unless a site asks for it."""

import base64
import gzip
import re
import zlib
from pathlib import Path

import pytest
from pydicom import dcmread

from apps.imaging.outputs.deidentify import IDENTITY_KEYWORDS, Pseudonyms, reference_headers
from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.summary import summarise
from apps.imaging.outputs.write import write_batch, write_case
from tests.apps.imaging.outputs.conftest import Written
from tests.apps.imaging.outputs.scan import IDENTITY, KEY, UID_ROOT, Sample

WORD = "sentinel"  # in every name, address and free text of the source


def readable(path: Path) -> bytes:
    """Return a file's bytes, and those that its compressed parts hold."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        return content + gzip.decompress(content)
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", content, re.DOTALL):
        try:
            content += zlib.decompress(base64.a85decode(b"<~" + stream.strip(), adobe=True))
        except (ValueError, zlib.error):
            content += stream
    return content


def secrets(sample: Sample) -> list[bytes]:
    """Return what must not be found: texts, dates, UIDs."""
    dates = [IDENTITY[k] for k in IDENTITY if k.endswith("Date")]
    return [
        WORD.encode(),
        UID_ROOT.encode(),
        *(date.encode() for date in dates),
        b"112233",
        b"083Y",
    ]


def everything(sample: Sample, directory: Path, settings: OutputSettings) -> dict[str, bytes]:
    outputs = write_case(sample.case, sample.findings, directory / "cases/1", settings)
    in_batch = {name: f"cases/1/{path}" for name, path in outputs.items()}
    summary = summarise(sample.case, sample.findings, in_batch, {"read": 1.0})
    write_batch([summary], directory, settings, 2.0)
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) >= len(outputs) + 3
    return {str(path.relative_to(directory)): readable(path).lower() for path in files}


@pytest.mark.slow
def test_no_file_holds_anything_of_the_source(
    filled: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    found = [
        (name, secret)
        for name, content in everything(filled, tmp_path, settings).items()
        for secret in secrets(filled)
        if secret.lower() in content
    ]
    assert found == []


def test_the_search_would_find_what_a_pdf_says(
    plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    files = everything(plain, tmp_path, settings)
    assert b"case-0001" in files["cases/1/report.pdf"]
    assert b"not a medical device" in files["cases/1/report.dcm"]


def test_kept_identity_is_in_dicom_and_nothing_else_of_the_header(
    plain: Sample, tmp_path: Path
) -> None:
    files = everything(plain, tmp_path, OutputSettings(KEY, keep_identity=True))
    dicom = [name for name in files if name.endswith(".dcm")]
    assert len(dicom) == 4
    for name in dicom:
        dataset = dcmread(tmp_path / name)
        for keyword in IDENTITY_KEYWORDS:
            if keyword in IDENTITY:
                assert str(dataset[keyword].value) == IDENTITY[keyword], keyword
        assert dataset.StudyInstanceUID == f"{UID_ROOT}.1"
        assert "PatientIdentityRemoved" not in dataset
        for text in (
            b"sentinel hospital",
            b"sentinel private",
            b"sentinel comment",
            b"sentineloperator",
        ):
            assert text not in files[name]
    others = [
        name for name in files if name not in dicom and name.endswith((".pdf", ".gz", ".json"))
    ]
    assert not [name for name in others if WORD.encode() in files[name]]
    assert b"sentinelsource/ct" in files["index.html"]


def test_derived_objects_say_that_they_are_deidentified(written_plain: Written) -> None:
    for name in ("segmentation", "measurements", "capture", "pdf_dicom"):
        dataset = dcmread(written_plain.directory / written_plain.outputs[name])
        assert dataset.PatientIdentityRemoved == "YES"
        assert dataset.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
        assert dataset.LongitudinalTemporalInformationModified == "REMOVED"
        assert re.fullmatch(r"P-[0-9a-f]{12}", dataset.PatientID)
        assert not dataset.StudyDate


def test_replaced_uids_agree_over_all_objects(
    written_plain: Written, settings: OutputSettings
) -> None:
    pseudonyms = Pseudonyms(settings)
    datasets = [
        dcmread(written_plain.directory / written_plain.outputs[name])
        for name in ("segmentation", "measurements", "capture", "pdf_dicom")
    ]
    assert {d.StudyInstanceUID for d in datasets} == {pseudonyms.uid(f"{UID_ROOT}.1")}
    assert len({d.SeriesInstanceUID for d in datasets}) == 4
    seg = datasets[0]
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == pseudonyms.uid(f"{UID_ROOT}.2")
    instances = [i.ReferencedSOPInstanceUID for i in series.ReferencedInstanceSequence]
    assert instances == [pseudonyms.uid(f"{UID_ROOT}.3.{k + 1}") for k in range(20)]
    assert seg.FrameOfReferenceUID == pseudonyms.uid(f"{UID_ROOT}.4")


def test_pseudonyms_depend_on_the_key_and_the_original_alone() -> None:
    first, again = Pseudonyms(OutputSettings(KEY)), Pseudonyms(OutputSettings(KEY))
    other = Pseudonyms(OutputSettings(KEY[::-1]))
    assert first.uid("1.2.3") == again.uid("1.2.3")
    assert len({first.uid("1.2.3"), first.uid("1.2.4"), other.uid("1.2.3")}) == 3
    assert re.fullmatch(r"2\.25\.[1-9][0-9]{0,38}", first.uid("1.2.3"))
    assert first.patient("A") != first.patient("B")
    assert first.derived_uid("a", "bc") != first.derived_uid("ab", "c")


def test_a_header_without_uids_still_refers_to_something_of_its_own(
    plain: Sample, settings: OutputSettings
) -> None:
    for header in plain.case.headers:
        assert header is not None
        del header.SOPInstanceUID, header.FrameOfReferenceUID, header.StudyInstanceUID
    headers = [h for h in reference_headers(plain.case, settings) if h is not None]
    assert len({h.SOPInstanceUID for h in headers}) == 20
    assert len({h.FrameOfReferenceUID for h in headers}) == 1


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        OutputSettings(b"short")


def test_a_key_is_not_shown() -> None:
    assert "1f" not in repr(OutputSettings(KEY))
