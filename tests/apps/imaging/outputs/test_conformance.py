"""Derived objects against the standard: required attributes always, dciodvfy where it is there.

The tables of attributes are those that highdicom ships; dciodvfy comes with dicom3tools.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from pydicom import Dataset, dcmread

from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.write import write_case
from tests.apps.imaging.outputs.conftest import Written
from tests.apps.imaging.outputs.scan import KEY, Sample

pytestmark = pytest.mark.slow

OBJECTS = ("segmentation", "measurements", "capture", "pdf_dicom")
IODS = {
    "segmentation": "segmentation",
    "measurements": "comprehensive-3d-sr",
    "capture": "secondary-capture-image",
    "pdf_dicom": "encapsulated-pdf",
}
BY_ITEM = ("functional-groups", "sr-document-content")  # required of some items, not of others
FOR_DICOMDIR = "needed to build DICOMDIR"  # study date and time, which are removed on purpose


@cache
def table(name: str) -> Any:  # noqa: ANN401 - JSON
    return json.loads((files("highdicom") / "_standard" / f"{name}.json").read_text())


def parents(dataset: Dataset, path: Sequence[str]) -> Iterator[Dataset]:
    if not path:
        yield dataset
        return
    for item in dataset.get(path[0], []):
        yield from parents(item, path[1:])


def faults(dataset: Dataset, iod: str) -> Iterator[str]:
    """Yield what a mandatory module of an object requires and the object has not."""
    modules = [entry["key"] for entry in table("iod_module_map")[iod] if entry["usage"] == "M"]
    assert len(modules) > 5
    for module in modules:
        if module.endswith(BY_ITEM):
            continue
        for attribute in table("module_attribute_map")[module]:
            keyword, kind = attribute["keyword"], attribute["type"]
            for parent in parents(dataset, attribute["path"]):
                if kind in {"1", "2"} and keyword not in parent:
                    yield f"{module}: {keyword} is not there"
                elif kind == "1" and parent[keyword].is_empty:
                    yield f"{module}: {keyword} is empty"


def test_required_attributes_are_there(any_written: Written) -> None:
    for name in OBJECTS:
        dataset = dcmread(any_written.directory / any_written.outputs[name])
        assert list(faults(dataset, IODS[name])) == []


def test_required_attributes_are_there_with_the_identity(any_form: Sample, tmp_path: Path) -> None:
    settings = OutputSettings(KEY, keep_identity=True)
    outputs = write_case(any_form.case, any_form.findings, tmp_path, settings)
    for name in OBJECTS:
        assert list(faults(dcmread(tmp_path / outputs[name]), IODS[name])) == []


def test_the_check_finds_what_is_missing(written_plain: Written) -> None:
    seg = dcmread(written_plain.directory / written_plain.outputs["segmentation"])
    del seg.SegmentSequence[0].SegmentLabel, seg.StudyDate
    seg.Manufacturer = ""
    found = list(faults(seg, "segmentation"))
    assert "segmentation-image: SegmentLabel is not there" in found
    assert "general-study: StudyDate is not there" in found
    assert "enhanced-general-equipment: Manufacturer is empty" in found


def test_dciodvfy_finds_no_fault(any_written: Written) -> None:
    program = which("dciodvfy") or which("dciodvfy", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("no dciodvfy; it comes with dicom3tools")
    for name in OBJECTS:
        path = any_written.directory / any_written.outputs[name]
        said = subprocess.run([program, path], capture_output=True, text=True, check=False).stderr
        lines = [line for line in said.splitlines() if FOR_DICOMDIR not in line]
        troubles = [line for line in lines if line.startswith(("Error", "Warning"))]
        assert troubles == [], name
