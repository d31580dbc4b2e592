"""Studies for measurements read back as what they were written from, or get their reason."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from apps.imaging.phantom import PhantomShape, make_phantom
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.reasons import Status
from apps.imaging.stack import SliceStack
from benchmarks.imaging_cases import volumes, write_cases, write_series, write_volume
from benchmarks.imaging_faults import FAULTS, write_faults
from benchmarks.imaging_kill import name_of, titled_below

SMALL = PhantomShape(slices=40, pixels=48, slice_mm=5.0, pixel_mm=8.0)
BOUNDS = Bounds()


def oblique() -> SliceStack:
    """Slices on a turned grid, whose rows and columns differ in number and distance."""
    stack, _ = make_phantom(1, SMALL)
    turn = np.radians(20.0)
    row = np.array([np.cos(turn), np.sin(turn), 0.0])
    column = np.array([-np.sin(turn), np.cos(turn), 0.0])
    origins = np.array([-120.25, 33.5, 7.0]) + np.outer(5.0 * np.arange(40), np.cross(row, column))
    hu = np.ascontiguousarray(stack.hu[:, :, 4:])
    return SliceStack(hu, origins, row, column, (1.25, 0.8), stack.is_interpolated)


@pytest.mark.parametrize("form", ["dicom", "nifti"])
def test_a_written_study_reads_back_value_for_value_at_its_place(form: str, tmp_path: Path) -> None:
    stack = oblique()
    if form == "dicom":
        write_series(stack, tmp_path / "study", "one")
    else:
        write_volume(stack, tmp_path / "study" / "ct.nii.gz")
    (source,) = discover(tmp_path / "study", BOUNDS).sources
    case = read_case(source, BOUNDS)
    assert (case.status, case.reasons) == (Status.CORRECT, ())
    assert case.stack is not None
    np.testing.assert_array_equal(case.stack.hu, stack.hu)
    np.testing.assert_allclose(case.stack.origins_mm, stack.origins_mm, atol=1e-4)
    np.testing.assert_allclose(case.stack.row_axis, stack.row_axis, atol=1e-6)
    np.testing.assert_allclose(case.stack.column_axis, stack.column_axis, atol=1e-6)
    assert case.stack.pixel_mm == pytest.approx(stack.pixel_mm)


def test_each_broken_study_is_one_case_and_gets_its_reason(tmp_path: Path) -> None:
    reasons = write_faults(make_phantom(0, SMALL)[0], tmp_path / "broken")
    assert len(reasons) == len(FAULTS) == 10
    found = {}
    for source in discover(tmp_path, BOUNDS).sources:
        case = read_case(source, BOUNDS)
        assert case.status is Status.QUARANTINED
        found[name_of(source.label)] = case.reasons[0].code
    assert found == reasons


def test_a_batch_holds_both_forms_and_says_how_many_slices(tmp_path: Path) -> None:
    num_slices = write_cases(2, tmp_path / "good")
    sources = discover(tmp_path, BOUNDS).sources
    assert Counter(source.kind for source in sources) == {"dicom": 1, "nifti": 1}
    stacks = {name_of(source.label): read_case(source, BOUNDS).stack for source in sources}
    assert {name: stack and stack.num_slices for name, stack in stacks.items()} == num_slices


def test_what_a_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    stack = oblique()
    dark = SliceStack(
        stack.hu - np.int16(500),
        stack.origins_mm,
        stack.row_axis,
        stack.column_axis,
        stack.pixel_mm,
        stack.is_interpolated,
    )
    with pytest.raises(ValueError, match=r"expected values from -1024 HU, got -15"):
        write_series(dark, tmp_path / "dark", "dark")
    places = stack.origins_mm.copy()
    places[20:] += 3.0 * stack.normal
    uneven = SliceStack(
        stack.hu, places, stack.row_axis, stack.column_axis, (1.25, 0.8), stack.is_interpolated
    )
    with pytest.raises(ValueError, match="expected slices in equal steps"):
        write_volume(uneven, tmp_path / "uneven.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"expected 1 files pt_\*\.npz or more, found 0"):
        next(volumes(1, tmp_path))


def test_processes_are_found_by_their_title_below_another_one() -> None:
    """A grandchild with the title is found, and not from beside it."""
    sleeper = "import os, sys; os.execv(sys.executable, ['ray::Worker.run', '-c', 'input()'])"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE) as running:
        found: list[int] = []
        while not found and running.poll() is None:
            found = titled_below(os.getpid(), "ray::Worker")
        assert found == titled_below(running.pid, "ray::Worker")
        assert found != [running.pid]
        assert titled_below(found[0], "ray::Worker") == []
        running.communicate(b"\n")
