"""Figures of the protocols against values known by construction."""

import numpy as np
import pytest

from apps.imaging.phantom import PhantomShape, make_phantom
from apps.imaging.training.calibrate import _least_sure, _referral
from apps.imaging.training.figures import hausdorff95, organ_figures, shape_figures
from apps.imaging.training.known import Known

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's


@pytest.fixture(scope="module")
def patient() -> Known:
    stack, labels = make_phantom(0, PhantomShape(slices=60, pixels=96, slice_mm=4.0, pixel_mm=4.2))
    labels[labels == 5] = 0  # no esophagus in this one
    return Known.of(stack, labels)


def test_the_truth_itself_scores_almost_all_and_nothing_scores_none(patient: Known) -> None:
    right = organ_figures([patient], [patient.volume.labels])
    assert right["dice_mean"] > 0.95
    assert right["absent"]["Esophagus"] == 1
    assert right["dice"]["Esophagus"] is None
    assert right["hd95_mean"] < 4.3
    nothing = organ_figures([patient], [patient.volume.labels * 0])
    assert nothing["dice_mean"] == 0.0
    assert nothing["hd95_mean"] > 20


def test_hausdorff_of_a_shift_is_the_shift() -> None:
    truth = np.zeros((20, 30, 40), dtype=np.bool_)
    truth[5:12, 6:20, 8:30] = True
    own = np.roll(truth, 3, axis=1)
    assert hausdorff95(own, truth, (2.0, 1.5, 1.0)) == pytest.approx(4.5)


def test_figures_of_shapes() -> None:
    truth = {part: np.array([0.0, 0.0, 0.0, 1.0, 1.0]) for part in ("val", "test")}
    scores = {"val": np.array([0.0, 1.0, 2.0, 3.0, 4.0]), "test": np.array([-3.0, -2, 1, -1, 2])}
    found = shape_figures(
        {part: each.astype(np.float32) for part, each in scores.items()},
        {part: each.astype(np.float32) for part, each in truth.items()},
    )
    assert found["val_auc"] == 1.0
    assert found["auc"] == pytest.approx(5 / 6)
    assert found["acc"] == pytest.approx(0.6)
    assert found["sensitivity"] == 0.5
    assert found["specificity"] == pytest.approx(2 / 3)
    assert found["majority"] == pytest.approx(0.6)


def test_at_most_a_tenth_of_poor_organs_is_called_sure() -> None:
    rng = np.random.default_rng(0)
    sure, dice = rng.random(200), np.where(rng.random(200) < 0.5, 0.3, 0.9)
    threshold = _least_sure(sure, dice)
    assert 0.05 < (sure[dice < 0.7] >= threshold).mean() <= 0.1
    few = _least_sure(np.array([0.4, 0.8, 0.9]), np.array([0.2, 0.9, 0.95]))
    assert few > 0.4


def test_nearly_all_poor_cases_are_referred() -> None:
    rng = np.random.default_rng(0)
    dice = rng.random(100)
    whole = np.clip(dice + rng.normal(0, 0.1, 100), 0, 1)
    threshold, reached = _referral(whole, dice)
    assert reached >= 0.95
    assert (whole[dice < 0.7] < threshold).mean() == pytest.approx(reached)
    assert _referral(whole, np.ones(100)) == (whole.min(), 1.0)
