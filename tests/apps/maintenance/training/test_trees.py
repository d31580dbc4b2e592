"""Cross-fitting: nobody is judged by a model that has seen it."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from apps.maintenance.training.trees import NUM_FOLDS, cross_fit

Mask = NDArray[np.bool_]


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
