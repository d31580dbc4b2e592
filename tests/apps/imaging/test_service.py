"""Real files through a whole batch, with a client that takes all bone for mandible."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from apps.imaging.batch.manifest import read_manifest
from apps.imaging.batch.process import Application
from apps.imaging.batch.verification import verify_command
from apps.imaging.calibration import HU_EDGES, Calibration
from apps.imaging.launch import run_command
from apps.imaging.outputs.settings import Kind, OutputSettings
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.segmentation import ORGANS
from apps.imaging.service import make_application, uid_key
from apps.imaging.windows import PATCH
from cluster.errors import ConfigurationError
from cluster.schemas import InferRequest, InferResponse, Timings
from tests.apps.imaging.batch.small_batch import hire_thread
from tests.apps.imaging.batch.test_batch_commands import parsed
from tests.apps.imaging.reading.faults import dropped, generated_slices, write_all

MANDIBLE = 1 + ORGANS.index("Mandible")
BONE_HU = 200.0
NUM_PROFILE = len(HU_EDGES) - 1 + 6


class BoneClient:
    """Takes what is denser than a limit for mandible, with a confidence of 200."""

    def __init__(self, limit_hu: float = BONE_HU) -> None:
        self.limit_hu = limit_hu

    async def infer(self, request: InferRequest) -> InferResponse:
        is_asked = request.extras["cell"][:, 0] < 12**3
        hu = request.features[is_asked]
        rows = np.zeros((len(hu), 2 * PATCH**3 + 1), np.uint8)
        rows[:, : PATCH**3] = np.where(hu > self.limit_hu, MANDIBLE, 0)
        rows[:, PATCH**3 : -1] = 200
        rows[:, -1] = 128
        return InferResponse(
            request.request_id,
            rows,
            np.array([0, len(rows)], np.int32),
            np.zeros(1, np.uint8),
            "bone-1",
            Timings(0.0, 0.0),
            np.zeros((1, 1), np.int64),
        )


CALIBRATION = Calibration(
    least_sure=dict.fromkeys(ORGANS, 0.5),
    miss_rate=0.1,
    profile_mean=(0.0,) * NUM_PROFILE,
    profile_scale=(1.0,) * NUM_PROFILE,
    farthest=10.0,
    refer_below=0.1,
    sensitivity=0.9,
)


@pytest.fixture
def application() -> Application:
    outputs = OutputSettings(b"0123456789abcdef", frozenset({Kind.REPORT, Kind.NIFTI}))
    return make_application(CALIBRATION, outputs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good series, one with a gap, one that is too short, and a folder without any."""
    slices = generated_slices()
    write_all(slices, tmp_path / "in" / "good")
    dropped(9)(generated_slices(), tmp_path / "in" / "gap")
    write_all(generated_slices()[:2], tmp_path / "in" / "short")
    (tmp_path / "in" / "text").mkdir()
    (tmp_path / "in" / "text" / "ct.dcm").write_text("no image")
    return tmp_path


@pytest.mark.slow
def test_real_cases_are_read_segmented_written_and_verified(
    folder: Path, application: Application, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    args = parsed("run", folder / "in", "--out", out, "--key", folder / "key.pem")
    assert run_command(args, application, partial(hire_thread, client=BoneClient())) == 0
    manifest = read_manifest(out / "manifest.json")
    cases: dict[str, Any] = {case["source"]: case for case in manifest["cases"]}
    statuses = {Path(source).name: case["status"] for source, case in cases.items()}
    assert statuses == {
        "good": "correct",
        "gap": "repaired",
        "short": "quarantined",
        "text": "quarantined",
    }
    for source in discover(folder / "in", Bounds()).sources:
        case, entry = read_case(source, Bounds()), cases[source.label]
        assert entry["series_uid"] == source.series_uid
        assert [each["code"] for each in entry["reasons"]] == [r.code for r in case.reasons]
        if case.stack is not None:
            assert entry["num_slices"] == case.stack.num_slices == 28
            assert entry["slice_positions_mm"] == pytest.approx(case.stack.positions_mm, abs=1e-3)
            labels = nibabel.Nifti1Image.from_filename(out / entry["outputs"]["labels"])
            voxels = np.asarray(labels.dataobj)
            assert Counter(voxels.ravel().tolist()).keys() == {0, MANDIBLE}
            is_bone = case.stack.hu.transpose(2, 1, 0) > BONE_HU
            overlap = 2 * (is_bone & (voxels == MANDIBLE)).sum()
            assert overlap / (is_bone.sum() + (voxels == MANDIBLE).sum()) > 0.6  # 3 mm grid
    assert (out / "index.html").is_file()
    assert {"read", "infer", "write"} <= cases["good"]["seconds"].keys()

    capsys.readouterr()
    check = parsed("verify", out, "--sample", "4")
    assert verify_command(check, application, partial(hire_thread, client=BoneClient())) == 0
    other = partial(hire_thread, client=BoneClient(limit_hu=20.0))
    assert verify_command(check, application, other) == 1
    said = capsys.readouterr().out
    assert said.count(f"label {MANDIBLE}: Dice ") == 2


def test_the_settings_tell_keys_apart_without_telling_them(application: Application) -> None:
    other = make_application(CALIBRATION, OutputSettings(b"another key, as long"))
    assert other.settings["uid_key"] != application.settings["uid_key"]
    assert other.settings["calibration"] == application.settings["calibration"]
    assert "0123456789abcdef" not in str(application.settings)


def test_the_key_of_pseudonyms_is_made_once_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    made = uid_key(path)
    assert len(made) == 32
    assert uid_key(path) == made
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="expected mode 600, got 640"):
        uid_key(path)
