"""When a model is believed: thresholds, confidence of a case, and the file beside the weights."""

from pathlib import Path

import numpy as np
import pytest

from apps.imaging.calibration import Calibration, case_confidence, profile
from apps.imaging.phantom import PhantomShape, make_phantom
from apps.imaging.reasons import Reason
from apps.imaging.resample import PatientGrid

PLAIN = Calibration({"Larynx": 0.8}, 0.1, (1.0, -2.0), (0.5, 2.0), 4.0, 0.6, 0.95)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    PLAIN.save(tmp_path / "organs.json")
    assert Calibration.load(tmp_path / "organs.json") == PLAIN


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"least_sure": {}, "more": 1}'])
def test_another_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "organs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"organs.json: expected the calibration"):
        Calibration.load(path)


def test_one_is_as_far_as_the_farthest_validation_case() -> None:
    profile = np.array([1.0 + 0.5 * 4.0, -2.0 + 2.0 * 4.0])
    assert PLAIN.unusual(profile) == pytest.approx(1.0)
    assert PLAIN.unusual(np.array([1.0, -2.0])) == 0.0


def test_repairs_and_oddness_lower_the_confidence_of_a_case() -> None:
    sure = [0.9, 0.7]
    assert case_confidence(sure, 0.5, ()) == pytest.approx(0.8)
    assert case_confidence(sure, 2.0, ()) == pytest.approx(0.4)
    gaps = [Reason("GAP_INTERPOLATED", "", 4.0), Reason("GAP_INTERPOLATED", "", 6.0)]
    assert case_confidence(sure, 0.5, gaps) == pytest.approx(0.4)
    assert case_confidence([], 0.5, ()) == 0.0


@pytest.mark.slow
def test_a_profile_tells_another_scan_from_alike_ones() -> None:
    def of(seed: int, shape: PhantomShape | None = None) -> np.ndarray:
        grid = PatientGrid(make_phantom(seed, shape)[0], 3.0)
        return profile(grid, grid.sample())

    alike = np.stack([of(seed) for seed in range(6)])
    mean, scale = alike.mean(axis=0), np.maximum(alike.std(axis=0), 1e-2)
    calibration = Calibration({}, 0.1, tuple(mean.tolist()), tuple(scale.tolist()), 1.0, 0.5, 0.95)
    ordinary = max(calibration.distance(of(seed)) for seed in (6, 7))
    thick = calibration.distance(of(8, PhantomShape(slices=40, slice_mm=7.0)))
    assert thick > 3 * ordinary
