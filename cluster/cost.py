"""How long a step takes: an online model, ``ms = a + sum over tasks of b_task * tokens_task``.

Recursive least squares over measured steps with directional forgetting: a step displaces
what was known about steps like it, and nothing else.  With plain exponential forgetting an
hour of equal batch steps forgets how cost splits into ``a`` and ``b``; the fixed cost then
drifts, budgets with it, and stream requests are refused for a delay that is not there
(docs/log.md#cost-model).  Starts from a weak prior, so that it is defined from the first
request on.  One step that a compiler or a pause made long moves it by a factor at most; a
machine that became slow is learnt in a few steps.  Pure arithmetic: no clock, no ray, no torch.

Source: Cao and Schwartz, "A directional forgetting algorithm based on the decomposition of
the information matrix", Automatica 36 (2000).
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

PRIOR_STEP_MS = 2.0  # launch cost of a step on one CPU core, before any measurement
PRIOR_TOKEN_MS = 1 / 28.0  # 28k tokens/s, `base` on one CPU core (design.md section 3)
TOKEN_UNIT = 1000.0  # regress on kilotokens: both unknowns then have like scale
DECAY = 0.98  # weight of the past in a step's direction: a memory of about 50 such steps
SURPRISE = 4.0  # a step counts for no more than so many times what was expected of it
PULL = 0.01  # weight of the prior against one measured step
MIN_TOKEN_MS = 1e-5  # a slope is never zero: budgets stay finite


class CostModel:
    """Milliseconds of a step from its tokens per task; a task is known from its first step on."""

    def __init__(self) -> None:
        self._column: dict[str, int] = {}
        self._prior = np.array([PRIOR_STEP_MS])
        self._floor = np.zeros(1)
        self._gram = PULL * np.eye(1)
        self._moment = PULL * self._prior
        self._weights = self._prior

    @property
    def step_ms(self) -> float:
        """Fixed cost of a step, ms."""
        return float(self._weights[0])

    def token_ms(self, task: str) -> float:
        """Cost of one more token of this task, ms."""
        column = self._column.get(task)
        return PRIOR_TOKEN_MS if column is None else float(self._weights[column]) / TOKEN_UNIT

    def predict_ms(self, tokens: Mapping[str, int]) -> float:
        """Return the expected duration of one step, ms."""
        return self.step_ms + sum(self.token_ms(task) * n for task, n in tokens.items())

    def observe(self, tokens: Mapping[str, int], elapsed_ms: float) -> None:
        """Learn from one finished step."""
        for task in tokens.keys() - self._column.keys():
            self._column[task] = self._prior.size
            self._prior = np.append(self._prior, PRIOR_TOKEN_MS * TOKEN_UNIT)
            self._weights = np.append(self._weights, self._prior[-1])
            self._floor = np.append(self._floor, MIN_TOKEN_MS * TOKEN_UNIT)
            self._gram = np.pad(self._gram, (0, 1))
            self._gram[-1, -1] = PULL
            self._moment = np.append(self._moment, PULL * self._prior[-1])
        x = np.zeros_like(self._prior)
        x[0] = 1.0
        for task, n in tokens.items():
            x[self._column[task]] = n / TOKEN_UNIT
        elapsed_ms = min(elapsed_ms, SURPRISE * max(float(self._weights @ x), PRIOR_STEP_MS))
        known = self._gram @ x
        share = (1.0 - DECAY) / (x @ known)
        self._moment += elapsed_ms * x - share * (x @ self._moment) * known
        self._gram += np.outer(x, x) - share * np.outer(known, known)
        self._weights = _solve_above(self._gram, self._moment, self._floor)


def _solve_above(
    gram: NDArray[np.float64], moment: NDArray[np.float64], floor: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Solve ``gram x = moment``; what falls below its floor is fixed there, the rest solved anew."""
    free = np.ones(floor.size, dtype=bool)
    x = floor.copy()
    while free.any():
        rest = moment - gram[:, ~free] @ floor[~free]
        x[free] = np.linalg.solve(gram[np.ix_(free, free)], rest[free])
        low = free & (x < floor)
        if not low.any():
            break
        x[low] = floor[low]
        free &= ~low
    return x
