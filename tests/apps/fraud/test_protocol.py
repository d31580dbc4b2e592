import os
from pathlib import Path

import numpy as np
import pytest

from apps.fraud import protocol
from apps.fraud.protocol import (
    TEST_STARTS,
    Fold,
    Ledger,
    bootstrap_reduction,
    card_precision,
    false_positives,
    threshold_at,
)
from apps.fraud.transaction import TransactionSchema

FOLD = Fold("2018-07-25")
SCORES = np.array([0.1, 0.9, 0.7, 0.8, 0.6])
FRAUD = np.array([False, True, True, False, False])


def draw_ledger(num_rows: int = 3000) -> Ledger:
    """Rows around the fold's weeks, few cards, much fraud."""
    rng = np.random.default_rng(11)
    day = np.sort(FOLD.start_day + rng.integers(-10, 30, num_rows))
    return Ledger(day, rng.integers(0, 60, num_rows), rng.random(num_rows) < 0.02)


def by_day(rows: list[tuple[int, int, bool]]) -> Ledger:
    day, card, fraud = zip(*rows, strict=True)
    return Ledger(np.array(day), np.array(card), np.array(fraud))


def test_days_are_those_of_the_calendar_in_utc() -> None:
    assert Fold("1970-01-02").start_day == 1
    assert FOLD.start_day == 17_737
    assert FOLD.train_end == FOLD.start_day + 7


@pytest.mark.parametrize(("first_day", "start"), [(17_000, 17_744 - 90), (17_690, 17_720)])
def test_training_reaches_back_90_days_at_most(first_day: int, start: int) -> None:
    assert FOLD.train_start(first_day) == start


def test_known_cards_are_removed_as_a_loop_over_rows_would() -> None:
    ledger = draw_ledger()
    expected, removed = [], 0
    for row, (day, card) in enumerate(zip(ledger.day, ledger.card, strict=True)):
        if not FOLD.start_day + 14 <= day < FOLD.start_day + 21:
            continue
        known = False
        for other in np.flatnonzero((ledger.card == card) & ledger.fraud):
            arrived = ledger.day[other] + 7 < day  # a label takes a week
            known |= bool(arrived and ledger.day[other] >= FOLD.start_day)
        removed += known
        if not known:
            expected.append(row)
    assert removed > 50
    assert sorted(FOLD.test_rows(ledger).tolist()) == expected


@pytest.mark.parametrize(
    ("fraud_day", "kept"), [(-1, True), (0, False), (6, False), (7, True), (13, True)]
)
def test_a_card_is_known_once_its_label_has_arrived(fraud_day: int, kept: bool) -> None:
    start = FOLD.start_day
    ledger = by_day([(start + fraud_day, 1, True), (start + 14, 1, False), (start + 14, 2, False)])
    assert FOLD.test_rows(ledger).tolist() == ([1, 2] if kept else [2])


@pytest.mark.parametrize(("recall", "count"), [(0.5, 0), (0.51, 1), (1.0, 1)])
def test_false_positives_lie_above_the_last_fraud_needed(recall: float, count: int) -> None:
    assert false_positives(SCORES, FRAUD, recall) == count
    threshold = threshold_at(SCORES, FRAUD, recall)
    assert threshold == (0.9 if recall == 0.5 else 0.7)
    assert int(((threshold <= SCORES) & ~FRAUD).sum()) == count


def test_false_positives_equal_a_count_at_the_threshold() -> None:
    rng = np.random.default_rng(2)
    scores, fraud = rng.permutation(500) / 500.0, rng.random(500) < 0.2
    for recall in (0.5, 0.6, 0.65, 0.7):
        flagged = scores >= threshold_at(scores, fraud, recall)
        assert (flagged & fraud).sum() == np.ceil(recall * fraud.sum())
        assert false_positives(scores, fraud, recall) == (flagged & ~fraud).sum()


def test_a_card_found_once_is_not_found_again() -> None:
    ledger = by_day([(0, 1, True), (0, 1, False), (0, 2, False), (1, 1, True), (1, 3, True)])
    scores = np.array([0.2, 0.9, 0.5, 0.9, 0.1])
    found = [0.01, 0.01]  # of 100 cards: card 1 on day 0, card 3 on day 1
    assert card_precision(scores, ledger, np.arange(5)) == pytest.approx(np.mean(found))


def test_only_the_hundred_top_cards_of_a_day_count() -> None:
    ledger = by_day([(0, card, card in {99, 100}) for card in range(150)])
    scores = -np.arange(150.0)
    assert card_precision(scores, ledger, np.arange(150)) == pytest.approx(0.01)
    assert card_precision(-scores, ledger, np.arange(150)) == pytest.approx(0.02)


def one_fold(cards: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[protocol.TestSet]:
    rng = np.random.default_rng(4)
    fraud = rng.random(cards.size) < 0.1
    ledger = Ledger(np.zeros(cards.size, np.int64), cards, fraud)
    noise = rng.normal(size=(2, cards.size))
    scores = {"ours": 3.0 * fraud + noise[0], "other": 2.0 * fraud + noise[1]}
    return [protocol.TestSet(ledger, np.arange(cards.size), scores)]


def reduction(fold: protocol.TestSet) -> float:
    fraud = fold.ledger.fraud
    counts = {
        n: sum(false_positives(s, fraud, r) for r in (0.6, 0.65)) for n, s in fold.scores.items()
    }
    return 1.0 - counts["ours"] / counts["other"]


def test_bootstrap_draws_whole_cards() -> None:
    folds = one_fold(np.zeros(800, np.int64))  # one card: every draw is the fold itself
    expected = reduction(folds[0])
    interval = bootstrap_reduction(folds, "ours", "other", draws=20, seed=0)
    assert interval == pytest.approx((expected, expected))


def test_bootstrap_interval_holds_the_reduction_and_repeats_with_its_seed() -> None:
    folds = one_fold(np.arange(2000) // 4)
    low, high = bootstrap_reduction(folds, "ours", "other", draws=100, seed=0)
    assert low < reduction(folds[0]) < high
    assert high - low > 0.01
    assert (low, high) == bootstrap_reduction(folds, "ours", "other", draws=100, seed=0)


def test_summary_averages_rates_and_adds_counts() -> None:
    folds = [
        {"auc": a, "ap": 0.5, "cp100": 0.2, **{f"fp@{r}": n for r in protocol.RECALLS}}
        for a, n in ((0.8, 10.0), (0.9, 30.0))
    ]
    summary = protocol.summarise(folds)
    assert summary["auc"] == pytest.approx(0.85)
    assert summary["auc_std"] == pytest.approx(np.sqrt(0.005))
    assert summary["fp_at_recall"] == {"0.5": 40.0, "0.6": 40.0, "0.65": 40.0, "0.7": 40.0}


@pytest.mark.data
def test_folds_of_the_handbook_have_the_published_sizes() -> None:
    path = Path(os.environ["TRIMOE_DATA"], "fraud", "handbook_raw.parquet")
    table = TransactionSchema().read_table(path)
    ledger = Ledger(
        day=table["time_ms"].to_numpy() // protocol.DAY_MS,
        card=table["card"].cat.codes.to_numpy().astype(np.int64),
        fraud=table["TX_FRAUD"].to_numpy() == 1,
    )
    folds = [Fold(start) for start in TEST_STARTS]
    weeks = [(ledger.day >= f.start_day) & (ledger.day < f.train_end) for f in folds]
    tests = [fold.test_rows(ledger) for fold in folds]
    assert [int(week.sum()) for week in weeks] == [67_240, 66_975, 67_080, 67_049]
    assert [rows.size for rows in tests] == [58_264, 57_937, 58_337, 57_604]
    assert sum(int(ledger.fraud[rows].sum()) for rows in tests) == 1602
