"""Two runs of a case, compared with differences whose size is known."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from apps.imaging.batch.repeatability import TOLERANCE, Run, dice_of, differences
from apps.imaging.finding import Organ
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reasons import Reason, Status

BOX = (0, 0, 0, 1, 1, 1)
MANDIBLE = Organ("Mandible", 7, 50.0, 300.0, 90.0, BOX, 0.9, is_sure=True)
LARYNX = Organ("Larynx", 6, 0.0, float("nan"), float("nan"), None, 0.0, is_sure=False)
SUMMARY = CaseSummary(
    "a",
    "in/a",
    "1.2",
    Status.REPAIRED,
    (Reason("GAP_INTERPOLATED", "one slice", 2.5),),
    3,
    (0.0, 5.0, 10.0),
    (MANDIBLE, LARYNX),
    0.4,
    0.8,
    model_version="m-1",
)


def found(again: CaseSummary, first: CaseSummary = SUMMARY) -> list[str]:
    nowhere = Path("nowhere")
    return list(differences(Run(first, nowhere), Run(again, nowhere), TOLERANCE))


def test_a_run_agrees_with_itself() -> None:
    assert found(SUMMARY) == []


def test_words_and_seconds_may_differ() -> None:
    reasons = (replace(SUMMARY.reasons[0], detail="said otherwise"),)
    assert found(replace(SUMMARY, reasons=reasons, seconds={"read": 9.0})) == []


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        (replace(SUMMARY, status=Status.CORRECT), "status: repaired, now correct"),
        (replace(SUMMARY, reasons=()), "reasons: GAP_INTERPOLATED, now none"),
        (replace(SUMMARY, model_version="m-2"), "model: m-1, now m-2"),
        (replace(SUMMARY, num_slices=4), "slices: 3, now 4"),
        (replace(SUMMARY, slice_positions_mm=(0.0, 5.002, 10.0)), "slice positions"),
        (replace(SUMMARY, confidence_case=None), "confidence: 0.8, now None"),
        (replace(SUMMARY, confidence_case=0.83), "confidence: 0.8, now 0.83"),
        (replace(SUMMARY, organs=(MANDIBLE,)), "organs: 2 measured, now 1"),
        (replace(SUMMARY, organs=(replace(MANDIBLE, volume_ml=50.6), LARYNX)), "Mandible: 50 ml"),
        (replace(SUMMARY, organs=(replace(MANDIBLE, mean_hu=303.0), LARYNX)), "Mandible: 300 HU"),
        (replace(SUMMARY, organs=(MANDIBLE, replace(LARYNX, mean_hu=1.0))), "Larynx: nan HU"),
        (replace(SUMMARY, organs=(MANDIBLE, replace(LARYNX, volume_ml=0.06))), "Larynx: 0 ml"),
    ],
)
def test_what_differs_is_named(again: CaseSummary, expected: str) -> None:
    (problem,) = found(again)
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    "again",
    [
        replace(SUMMARY, slice_positions_mm=(0.0, 5.0005, 10.0)),
        replace(SUMMARY, confidence_case=0.81),
        replace(SUMMARY, organs=(replace(MANDIBLE, volume_ml=50.4), LARYNX)),
        replace(SUMMARY, organs=(MANDIBLE, replace(LARYNX, volume_ml=0.04))),
    ],
)
def test_what_the_tolerance_covers_is_not(again: CaseSummary) -> None:
    assert found(again) == []


def written(folder: Path, labels: NDArray[np.uint8]) -> Run:
    folder.mkdir()
    nibabel.Nifti1Image(labels, np.eye(4)).to_filename(folder / "labels.nii.gz")
    return Run(replace(SUMMARY, outputs={"labels": "labels.nii.gz"}), folder)


def labelled(num: int, shape: tuple[int, int, int] = (10, 10, 10)) -> NDArray[np.uint8]:
    """A map whose first ``num`` voxels are organ 7."""
    labels = np.zeros(shape, np.uint8)
    labels.ravel()[:num] = 7
    return labels


@pytest.mark.parametrize(
    ("num", "expected"),
    [
        (500, []),
        (492, []),
        (489, ["label 7: Dice 0.9889, expected 0.99 at least"]),
        (0, ["label 7: Dice 0.0000, expected 0.99 at least"]),
    ],
)
def test_label_maps_are_compared_by_dice(num: int, expected: list[str], tmp_path: Path) -> None:
    first = written(tmp_path / "first", labelled(500))
    again = written(tmp_path / "again", labelled(num))
    assert list(differences(first, again, TOLERANCE)) == expected


def test_label_maps_of_another_shape_or_missing_are_named(tmp_path: Path) -> None:
    first = written(tmp_path / "first", labelled(500))
    other = written(tmp_path / "other", labelled(500, (10, 10, 11)))
    assert list(differences(first, other, TOLERANCE)) == [
        "label map: (10, 10, 10), now (10, 10, 11)"
    ]
    none = Run(SUMMARY, tmp_path)
    assert list(differences(first, none, TOLERANCE)) == [
        "label map: written in one of the runs alone"
    ]


def test_dice_against_the_formula_by_hand() -> None:
    first = np.array([0, 1, 1, 1, 2, 2, 0], np.uint8)
    again = np.array([0, 1, 1, 2, 2, 0, 3], np.uint8)
    assert dice_of(first, again) == {1: 2 * 2 / (3 + 2), 2: 2 * 1 / (2 + 2), 3: 0.0}
