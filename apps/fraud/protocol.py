"""The handbook's evaluation protocol: folds, label delay, known cards, metrics.

Folds, delay and removal of known cards are those of the Fraud Detection Handbook
(Le Borgne et al., chapters 5 and 7); training may reach back up to 90 days and is
then no longer the handbook's seven-day training.  Pure numpy; knows no model.

Legend: N rows of the table, M rows of a test set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DAY_MS = 86_400_000
TEST_STARTS = ("2018-07-25", "2018-08-01", "2018-08-08", "2018-08-15")
VALIDATION_STARTS = ("2018-06-20", "2018-06-27", "2018-07-04", "2018-07-11")
RECALLS = (0.5, 0.6, 0.65, 0.7)
HISTORY_DAYS = 90  # training reaches back at most this far
WARM_UP_DAYS = 30  # of the table; windows reach back 30 days
TRAIN_DAYS = 7
DELAY_DAYS = 7
TEST_DAYS = 7
CARDS_PER_DAY = 100


@dataclass(frozen=True, slots=True)
class Ledger:
    """The columns the protocol looks at.

    Args:
        day: Epoch day (UTC) of each row [N].
        card: Number of the card [N].
        fraud: bool [N].
    """

    day: Ints
    card: Ints
    fraud: NDArray[np.bool_]

    @property
    def first_day(self) -> int:
        """Epoch day of the first row."""
        return int(self.day.min())


@dataclass(frozen=True, slots=True)
class Fold:
    """One fold by the first day of its training week."""

    start: str

    @property
    def start_day(self) -> int:
        """Epoch day on which the training week begins."""
        moment = datetime.combine(date.fromisoformat(self.start), datetime.min.time(), UTC)
        return int(moment.timestamp() * 1000) // DAY_MS

    @property
    def train_end(self) -> int:
        """First day after training."""
        return self.start_day + TRAIN_DAYS

    def train_start(self, first_day: int) -> int:
        """Return the first day of training on a table that begins on ``first_day``."""
        return max(first_day + WARM_UP_DAYS, self.train_end - HISTORY_DAYS)

    def test_rows(self, ledger: Ledger) -> Ints:
        """Return the rows of the test week whose card is not yet known as compromised.

        On test day d a card is known if it has a fraud on days start .. d - 8: training
        frauds and those whose label has arrived.
        """
        first = self.train_end + DELAY_DAYS
        kept = []
        for day in range(first, first + TEST_DAYS):
            past = (ledger.day >= self.start_day) & (ledger.day < day - DELAY_DAYS)
            known = np.unique(ledger.card[past & ledger.fraud])
            rows = np.flatnonzero(ledger.day == day)
            kept.append(rows[~np.isin(ledger.card[rows], known)])
        return np.concatenate(kept)


def false_positives(scores: Floats, fraud: NDArray[np.bool_], recall: float) -> int:
    """Return the false positives at the first threshold that reaches ``recall``."""
    order = np.argsort(-scores, kind="stable")
    needed = int(np.ceil(recall * fraud.sum()))
    position = int(np.searchsorted(np.cumsum(fraud[order]), needed))
    return position + 1 - needed


def threshold_at(scores: Floats, fraud: NDArray[np.bool_], recall: float) -> float:
    """Return the highest threshold that reaches ``recall``."""
    frauds = np.sort(scores[fraud])[::-1]
    return float(frauds[int(np.ceil(recall * frauds.size)) - 1])


def card_precision(scores: Floats, ledger: Ledger, rows: Ints) -> float:
    """Return CP@100: the mean over days of the share of frauds among the 100 top cards.

    Cards found on an earlier day are not looked at again.
    """
    found: set[int] = set()
    shares = []
    for day in np.unique(ledger.day[rows]):
        today = ledger.day[rows] == day
        cards, index = np.unique(ledger.card[rows][today], return_inverse=True)
        best = np.full(cards.size, -np.inf)
        np.maximum.at(best, index, scores[today])
        is_fraud = np.zeros(cards.size, bool)
        np.logical_or.at(is_fraud, index, ledger.fraud[rows][today])
        best[np.isin(cards, list(found))] = -np.inf
        top = np.argsort(-best, kind="stable")[:CARDS_PER_DAY]
        hits = cards[top][is_fraud[top] & np.isfinite(best[top])]
        found.update(hits.tolist())
        shares.append(hits.size / CARDS_PER_DAY)
    return float(np.mean(shares))


def metrics(scores: Floats, ledger: Ledger, rows: Ints) -> dict[str, float]:
    """Return auc, ap, cp100 and fp_at_recall_* of one test set."""
    from sklearn.metrics import (  # noqa: PLC0415 - scikit-learn only in evaluation
        average_precision_score,
        roc_auc_score,
    )

    fraud = ledger.fraud[rows]
    values = {
        "auc": float(roc_auc_score(fraud, scores)),
        "ap": float(average_precision_score(fraud, scores)),
        "cp100": card_precision(scores, ledger, rows),
    }
    return values | {f"fp@{r}": float(false_positives(scores, fraud, r)) for r in RECALLS}


def summarise(folds: list[dict[str, float]]) -> dict[str, object]:
    """Return means and deviations over folds; false positives are summed."""
    summary: dict[str, object] = {}
    for name in ("auc", "ap", "cp100"):
        values = [fold[name] for fold in folds]
        summary[name] = float(np.mean(values))
        summary[f"{name}_std"] = float(np.std(values, ddof=1))
    counts = {r: [fold[f"fp@{r}"] for fold in folds] for r in RECALLS}
    summary["fp_at_recall"] = {str(r): float(np.sum(c)) for r, c in counts.items()}
    summary["fp_at_recall_std"] = {str(r): float(np.std(c, ddof=1)) for r, c in counts.items()}
    return summary


@dataclass(frozen=True, slots=True)
class TestSet:
    """Scores of several systems on one fold's test rows."""

    ledger: Ledger
    rows: Ints
    scores: Mapping[str, Floats]


def bootstrap_reduction(
    folds: list[TestSet], ours: str, other: str, *, draws: int, seed: int
) -> tuple[float, float]:
    """Return the 95 % interval of 1 - FP(ours) / FP(other) at recall .6 and .65 together.

    Whole cards are drawn with replacement inside each fold.
    """
    generator = np.random.default_rng(seed)
    reductions = []
    for _ in range(draws):
        totals = {ours: 0, other: 0}
        for fold in folds:
            picked = _draw_cards(fold.ledger.card[fold.rows], generator)
            fraud = fold.ledger.fraud[fold.rows][picked]
            for name in totals:
                scores = fold.scores[name][picked]
                totals[name] += sum(false_positives(scores, fraud, r) for r in (0.6, 0.65))
        reductions.append(1.0 - totals[ours] / max(totals[other], 1))
    low, high = np.quantile(reductions, (0.025, 0.975))
    return float(low), float(high)


def _draw_cards(cards: Ints, generator: np.random.Generator) -> Ints:
    """Return rows of as many cards as there are, drawn with replacement."""
    order = np.argsort(cards, kind="stable")
    _, starts, sizes = np.unique(cards[order], return_index=True, return_counts=True)
    drawn = generator.integers(0, starts.size, starts.size)
    lengths = sizes[drawn]
    shift = np.repeat(starts[drawn] - (np.cumsum(lengths) - lengths), lengths)
    rows: Ints = order[np.arange(int(lengths.sum())) + shift]
    return rows
