import json
from pathlib import Path

import numpy as np
import pytest

from apps.fraud.chaining import EASY_SHARE, GAP_DAYS, NUM_TREES, fit_trees, keep_shares, plan


@pytest.mark.parametrize("start", [0, 17_650])
@pytest.mark.parametrize("days", range(29, 92))
def test_every_day_after_four_weeks_is_scored_once_and_blindly(start: int, days: int) -> None:
    links = plan(start, start + days)
    scored = [day for link in links for day in range(link.first, link.last)]
    assert scored == list(range(start + 28, start + days))
    for link in links:
        assert link.start == start < link.fit_end
        assert link.first - link.fit_end >= GAP_DAYS == 7


def test_too_few_days_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 29 training days, got 28"):
        plan(100, 128)


def test_frauds_and_suspicious_rows_are_always_kept() -> None:
    logit = np.array([-9.0, -9.0, -5.4, 2.0], np.float32)
    fraud = np.array([False, True, False, False])
    assert keep_shares(logit, fraud).tolist() == [EASY_SHARE, 1.0, 1.0, 1.0]


def test_trees_are_fitted_on_the_masked_rows_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    context = rng.normal(size=(400, 3)).astype(np.float32)
    fraud, rows = context[:, 0] > 1.0, np.arange(400) < 300
    poisoned = np.where(rows, fraud, ~fraud)  # labels outside the mask must not matter
    first = fit_trees(context, fraud, rows, tmp_path / "first.json", 1)
    second = fit_trees(context, poisoned, rows, tmp_path / "second.json", 1)
    assert first.read_text() == second.read_text()
    trees = json.loads(first.read_text())["learner"]["gradient_booster"]["model"]["trees"]
    assert len(trees) == NUM_TREES
    first.write_text("kept")
    assert fit_trees(context, fraud, rows, first, 1).read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"first.json", "second.json"}
