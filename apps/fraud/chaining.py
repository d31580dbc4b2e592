"""Forward chaining: tree logits for training rows from trees that never saw them.

A gate trained on rows that the trees were fitted on learns to trust an overconfident
tree.  So the training days are walked forward: trees fitted on the days before a cut
score the days from a week after it (the label delay) to a week after the next cut.
Rows before the first scored day have no such logit; they teach the sequence experts
alone.  The served trees are fitted on all training days.

Training rows are then sampled by hardness: all frauds, all rows that a tree finds
suspicious, and a share of the rest with the inverse of the share as weight.

Legend: N rows of the table, C context features.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray

Floats32 = NDArray[np.float32]

FIRST_FIT_DAYS = 21
STEP_DAYS = 14
GAP_DAYS = 7  # labels of the fitted days have arrived when the next scored day begins
HARD_LOGIT = -5.5  # about the base rate of fraud, .8 %, is -4.8
EASY_SHARE = 0.03
BOOSTER_PARAMETERS = {
    "objective": "binary:logistic",
    "tree_method": "hist",
    "max_bin": 1024,  # 256 bins cost .03 AP, see docs/log.md
    "base_score": 0.5,
    "eta": 0.05,
    "max_depth": 4,
}
NUM_TREES = 300


@dataclass(frozen=True, slots=True)
class Link:
    """Trees fitted on [start, fit_end) score the days [first, last)."""

    start: int
    fit_end: int
    first: int
    last: int


def plan(start: int, stop: int) -> list[Link]:
    """Return the chain over the training days [start, stop), cuts every two weeks.

    Raises:
        ValueError: The days are too few for one link.
    """
    cuts = list(range(start + FIRST_FIT_DAYS, stop - GAP_DAYS, STEP_DAYS))
    if not cuts:
        needed = FIRST_FIT_DAYS + GAP_DAYS + 1
        message = f"expected at least {needed} training days, got {stop - start}"
        raise ValueError(message)
    begins = [cut + GAP_DAYS for cut in cuts]
    return [
        Link(start, cut, begin, end)
        for cut, begin, end in zip(cuts, begins, [*begins[1:], stop], strict=True)
    ]


def fit_trees(
    context: Floats32, fraud: NDArray[np.bool_], rows: NDArray[np.bool_], path: Path, threads: int
) -> Path:
    """Fit the ensemble on the masked rows and store it as JSON, unless it is there already."""
    if not path.exists():
        matrix = xgb.QuantileDMatrix(
            context[rows], fraud[rows], max_bin=BOOSTER_PARAMETERS["max_bin"], nthread=threads
        )
        booster = xgb.train({**BOOSTER_PARAMETERS, "nthread": threads}, matrix, NUM_TREES)
        partial = path.with_name(f"partial-{path.name}")
        booster.save_model(partial)
        partial.rename(path)
    return path


def keep_shares(tree_logit: Floats32, fraud: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the probability with which each row is kept for training, [N]."""
    return np.where(fraud | (tree_logit > HARD_LOGIT), 1.0, EASY_SHARE)
