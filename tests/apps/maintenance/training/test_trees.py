"""Cross-fitting: nobody is judged by a model that has seen it.  Hazards: of what is still at risk."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from apps.maintenance.protocol import NEVER
from apps.maintenance.training.trees import (
    NUM_FOLDS,
    Lives,
    ask_trees,
    cross_fit,
    fit_hazard_trees,
)
from core_model.series_tasks import FORECAST_CONTEXT, HORIZONS, NUM_COMPONENTS

Mask = NDArray[np.bool_]
NUM_ROWS = 400


@pytest.mark.parametrize("step", [1, NUM_FOLDS])
def test_no_group_is_answered_by_what_was_learnt_on_it(step: int) -> None:
    groups = np.repeat(np.arange(10), 3) * step + 7

    def fit(kept: Mask) -> Callable[[Mask], NDArray[np.float32]]:
        seen = set(groups[kept].tolist())
        assert len(seen) >= 7

        def answer(asked: Mask) -> NDArray[np.float32]:
            assert not seen & set(groups[asked].tolist())
            return groups[asked, None].astype(np.float32)

        return answer

    np.testing.assert_array_equal(cross_fit(groups, 1, fit)[:, 0], groups)


def test_too_few_groups_are_an_error() -> None:
    groups = np.repeat(np.arange(NUM_FOLDS - 1), 5)
    with pytest.raises(ValueError, match="expected at least 4 machines or units, got 3"):
        cross_fit(groups, 1, lambda _: lambda asked: np.zeros((int(asked.sum()), 1), np.float32))


def test_a_component_counts_in_the_buckets_that_it_lived_up_to() -> None:
    """A half fails in the first bucket and the rest in the second, so all that is left fails there."""
    context = np.full((NUM_ROWS, len(FORECAST_CONTEXT)), np.nan, np.float32)
    hours = np.full((NUM_ROWS, NUM_COMPONENTS), NEVER)
    hours[:, 0] = np.where(np.arange(NUM_ROWS) % 2, HORIZONS[0], HORIZONS[1])
    observed, weight = np.full(NUM_ROWS, HORIZONS[-1]), np.ones(NUM_ROWS, np.float32)
    booster = fit_hazard_trees(Lives(context, hours, observed, weight), 0, 1)
    logits = ask_trees(booster, context[:1]).reshape(len(HORIZONS), NUM_COMPONENTS)
    chances = 1.0 / (1.0 + np.exp(-logits))
    assert chances[0, 0] == pytest.approx(0.5, abs=0.05)
    assert chances[1, 0] > 0.95
    assert (chances[:, 1:] < 0.05).all()


def test_what_was_not_looked_after_counts_for_nothing() -> None:
    """Rows without a failure that were watched for four hours say nothing of the second bucket."""
    context = np.full((NUM_ROWS, len(FORECAST_CONTEXT)), np.nan, np.float32)
    hours = np.full((NUM_ROWS, NUM_COMPONENTS), NEVER)
    hours[::4, 0] = HORIZONS[1]
    observed = np.where(np.arange(NUM_ROWS) % 4, HORIZONS[0], HORIZONS[1])
    lives = Lives(context, hours, observed, np.ones(NUM_ROWS, np.float32))
    logits = ask_trees(fit_hazard_trees(lives, 0, 1), context[:1])
    assert logits[0, NUM_COMPONENTS] > 3.0
