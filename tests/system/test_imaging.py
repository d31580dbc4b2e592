"""``trimoe imaging run`` and ``verify`` on a local platform, with weights that know nothing."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.imaging.phantom import PhantomShape, make_phantom
from benchmarks.imaging_cases import write_volume
from benchmarks.untrained_organs import write_untrained

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SMALL = PhantomShape(slices=40, pixels=64, slice_mm=6.0, pixel_mm=6.4)
BROKEN = "truncated.nii.gz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with untrained weights, and studies: two whole, one zipped, one broken."""
    root = tmp_path_factory.mktemp("ct batch")
    write_untrained(root / "models")
    studies = root / "studies"
    (studies / "nested").mkdir(parents=True)
    write_nifti(studies / "one.nii.gz", 1)
    write_nifti(studies / "nested/two.nii.gz", 2)
    write_nifti(root / "three.nii.gz", 3)
    with zipfile.ZipFile(studies / "three.zip", "w") as archive:
        archive.write(root / "three.nii.gz", "three.nii.gz")
    whole = (studies / "one.nii.gz").read_bytes()
    (studies / BROKEN).write_bytes(whole[: len(whole) // 2])
    return root


def write_nifti(path: Path, seed: int) -> None:
    write_volume(make_phantom(seed, SMALL)[0], path)


def trimoe(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "apps.cli", "imaging", *words]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(root)}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_folder_becomes_reports_and_a_manifest_that_is_verified(folder: Path) -> None:
    ran = trimoe(folder, "run", "studies", "--out", "results", "--workers", "1")
    assert ran.returncode == 0, ran.stderr
    manifest = json.loads((folder / "results/manifest.json").read_text(encoding="utf-8"))
    cases: dict[str, dict[str, Any]] = {case["source"]: case for case in manifest["cases"]}
    assert len(manifest["cases"]) == len(cases) == 4
    (broken,) = [source for source in cases if BROKEN in source]
    for source, case in cases.items():
        if source == broken:
            assert case["status"] == "quarantined"
            assert case["reasons"]
        else:
            assert case["status"] == "correct"
            assert case["num_slices"] == SMALL.slices
            steps = np.diff(case["slice_positions_mm"])
            np.testing.assert_allclose(steps, SMALL.slice_mm, atol=0.01)
        for path in case["outputs"].values():
            assert (folder / "results" / path).is_file()
    assert (folder / "results/index.html").is_file()

    checked = trimoe(folder, "verify", "results", "--sample", "1", "--workers", "1")
    assert checked.returncode == 0, checked.stderr + checked.stdout

    report = next((folder / "results").glob("cases/*/report.html"))
    report.write_text(report.read_text(encoding="utf-8") + "<!-- changed -->", encoding="utf-8")
    altered = trimoe(folder, "verify", "results", "--sample", "0", "--workers", "1")
    assert altered.returncode != 0
