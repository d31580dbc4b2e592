import json
from typing import Any

import numpy as np
import pytest
import torch
import xgboost as xgb
from numpy.typing import NDArray

from core_model.trees import empty_ensemble, ensemble_from_xgboost
from kernels.trees import tree_ensemble

NUM_FEATURES = 6
Floats32 = NDArray[np.float32]


def fit(**parameters: Any) -> tuple[xgb.Booster, Floats32]:  # noqa: ANN401 - passed on
    """Boosted trees on rows with missing values, and rows to ask about."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(600, NUM_FEATURES)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    y = np.nan_to_num(x[:, 0]) + np.nan_to_num(x[:, 1], nan=1.0) + rng.normal(size=600) > 0.8
    settings = {"objective": "binary:logistic", "max_depth": 4, "eta": 0.3, "nthread": 1}
    booster = xgb.train({**settings, **parameters}, xgb.DMatrix(x, y), 12)
    return booster, x[:200]


def parsed(booster: xgb.Booster) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(booster.save_raw("json"))
    return model


@pytest.mark.parametrize(
    "parameters",
    [{"base_score": 0.5}, {"base_score": 0.1}, {"gamma": 3.0}, {"max_depth": 1}, {"gamma": 1e9}],
    ids=str,
)
def test_arrays_answer_as_the_trainer_does(parameters: dict[str, float]) -> None:
    booster, x = fit(**parameters)
    logit, contributions = tree_ensemble(
        torch.from_numpy(x), ensemble_from_xgboost(parsed(booster), NUM_FEATURES)
    )
    matrix = xgb.DMatrix(x)
    margin = booster.predict(matrix, output_margin=True)
    np.testing.assert_allclose(logit.numpy(), margin, atol=1e-5)
    expected = booster.predict(matrix, pred_contribs=True, approx_contribs=True)
    np.testing.assert_allclose(contributions.numpy(), expected[:, :-1], atol=1e-5)


def test_a_leaf_above_the_last_level_is_repeated_below_itself() -> None:
    booster, _ = fit(gamma=3.0)
    ensemble = ensemble_from_xgboost(parsed(booster), NUM_FEATURES)
    filler_SN = ensemble.threshold_SN.isinf()
    assert filler_SN.any()
    depth = ensemble.leaf_SL.shape[1].bit_length() - 1
    last_level_SN = filler_SN[:, 2 ** (depth - 1) - 1 :]
    left_SL, right_SL = ensemble.leaf_SL[:, ::2], ensemble.leaf_SL[:, 1::2]
    assert torch.equal(left_SL[last_level_SN], right_SL[last_level_SN])
    assert bool((left_SL != right_SL)[~last_level_SN].all())


def test_contributions_and_the_roots_make_up_the_logit() -> None:
    booster, x = fit()
    logit, contributions = tree_ensemble(
        torch.from_numpy(x), ensemble_from_xgboost(parsed(booster), NUM_FEATURES)
    )
    rest = logit - contributions.sum(dim=1)
    assert float(rest.max() - rest.min()) < 1e-5


def test_no_trees_answer_zero() -> None:
    logit, contributions = tree_ensemble(torch.zeros(3, 4), empty_ensemble(4))
    assert logit.tolist() == [0.0] * 3
    assert contributions.abs().sum() == 0.0
    assert contributions.shape == (3, 4)
