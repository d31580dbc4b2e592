"""The state of a stream gives what the whole table gives, to the last bit."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from apps.fraud.features import CONTEXT_NAMES, DAY_MS, Features, join
from apps.fraud.labels import Label
from apps.fraud.offline import HistoryIndex, offline_context
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.state import FeatureState
from apps.fraud.transaction import Transaction

COLUMNS = ["transaction_id", "time_ms", "card", "terminal", "amount_minor"]
NOW_MS = 17_622 * DAY_MS


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Return 60 days in which many rows of a terminal share a second."""
    config = SimulationConfig(60, 40, 60, 30.0, terminals_per_day=60.0, cards_per_day=50.0, seed=5)
    simulated = simulate(config)
    simulated["time_ms"] -= simulated["time_ms"] % 600_000
    return simulated


@pytest.fixture(scope="module")
def expected(table: pd.DataFrame) -> Features:
    return HistoryIndex(table).features(np.arange(len(table)), offline_context(table))


def transactions_of(table: pd.DataFrame) -> list[Transaction]:
    values = zip(*(table[name].tolist() for name in COLUMNS), strict=True)
    return [Transaction(*row) for row in values]


def polls(num_rows: int, seed: int) -> Iterator[slice]:
    rng, start = np.random.default_rng(seed), 0
    while start < num_rows:
        end = start + int(rng.integers(1, 200))
        yield slice(start, end)
        start = end


def add_labels(state: FeatureState, table: pd.DataFrame) -> None:
    columns = (table["transaction_id"].tolist(), table["TX_FRAUD"].tolist())
    for transaction_id, fraud in zip(*columns, strict=True):
        state.add_label(Label(transaction_id, bool(fraud)))


def stream(state: FeatureState, transactions: list[Transaction], seed: int = 0) -> Features:
    batches = [transactions[poll] for poll in polls(len(transactions), seed)]
    return join([state.advance(batch, [True] * len(batch)) for batch in batches])


def assert_same(got: Features, wanted: Features) -> None:
    assert got.cu_seqlens.tobytes() == wanted.cu_seqlens.tobytes()
    assert got.context.tobytes() == wanted.context.tobytes()
    assert got.history.tobytes() == wanted.history.tobytes()


def test_a_stream_equals_the_table(table: pd.DataFrame, expected: Features) -> None:
    state = FeatureState()
    add_labels(state, table)
    assert_same(stream(state, transactions_of(table)), expected)
    assert expected.history[:, 4].sum() > 100  # known frauds were among the rows


@pytest.mark.parametrize("seed", [1, 2])
def test_compaction_is_never_noticed(table: pd.DataFrame, expected: Features, seed: int) -> None:
    state = FeatureState(spare_rows=300)
    add_labels(state, table)
    assert_same(stream(state, transactions_of(table), seed), expected)
    state.compact()
    assert state.snapshot()["event_time_ms"].size < 0.9 * len(table)


@pytest.mark.parametrize("cut", [0, 1, 1500, 5000])
def test_a_restored_snapshot_continues_exactly(
    table: pd.DataFrame, expected: Features, cut: int
) -> None:
    transactions = transactions_of(table)
    state = FeatureState(spare_rows=400)
    add_labels(state, table)
    parts = [stream(state, transactions[:cut])] if cut else []
    arrays = state.snapshot()
    state.advance(transactions[cut : cut + 50], [True] * 50)  # the snapshot is a copy
    assert all(array.dtype.kind in "iUbf" for array in arrays.values())
    parts.append(stream(FeatureState.restore(arrays), transactions[cut:], seed=3))
    assert_same(join(parts), expected)


@pytest.mark.parametrize("cut", [1, 2000, 6000])
def test_a_warm_start_equals_streaming(table: pd.DataFrame, expected: Features, cut: int) -> None:
    state = FeatureState.warm(table.iloc[:cut].sample(frac=1, random_state=0))
    add_labels(state, table.iloc[cut:])
    got = stream(state, transactions_of(table)[cut:])
    wanted = HistoryIndex(table).features(np.arange(cut, len(table)), expected.context)
    assert_same(got, wanted)


def test_three_workers_together_equal_one(table: pd.DataFrame, expected: Features) -> None:
    transactions = transactions_of(table)
    for worker in range(3):
        state = FeatureState(spare_rows=1000)
        add_labels(state, table)
        owned = [int(t.card) % 3 == worker for t in transactions]
        parts = [
            state.advance(transactions[poll], owned[poll]) for poll in polls(len(table), worker)
        ]
        wanted = HistoryIndex(table).features(np.flatnonzero(owned), expected.context)
        assert_same(join(parts), wanted)


@pytest.mark.slow
def test_labels_after_the_transaction_and_corrections_count_alike(
    table: pd.DataFrame, expected: Features
) -> None:
    """Each label comes six days late, after a wrong one at once."""
    transactions, frauds = transactions_of(table), table["TX_FRAUD"].tolist()
    state, done, parts = FeatureState(), 0, []
    for transaction in transactions:
        while transactions[done].time_ms < transaction.time_ms - 6 * DAY_MS:
            state.add_label(Label(done, bool(frauds[done])))
            done += 1
        parts.append(state.advance([transaction], [True]))
        state.add_label(Label(transaction.transaction_id, is_fraud=True))
    assert_same(join(parts), expected)


def test_string_ids_work_throughout(table: pd.DataFrame) -> None:
    named = table.assign(transaction_id=[f"tx-{i:06d}" for i in table["transaction_id"]])
    head, tail = named.iloc[:3000], named.iloc[3000:4000]
    state = FeatureState.restore(FeatureState.warm(head).snapshot())
    add_labels(state, tail)
    context = offline_context(named.iloc[:4000])
    wanted = HistoryIndex(named.iloc[:4000]).features(np.arange(3000, 4000), context)
    assert_same(stream(state, transactions_of(tail)), wanted)


def test_huge_amounts_equal_the_table_and_survive_compaction(table: pd.DataFrame) -> None:
    amount = table["amount_minor"]
    huge = table.assign(amount_minor=amount.where(amount % 2 == 0, 2**40 - 1 - amount))
    state = FeatureState(spare_rows=500)
    add_labels(state, huge)
    got = stream(state, transactions_of(huge))
    wanted = HistoryIndex(huge).features(np.arange(len(huge)), offline_context(huge))
    assert_same(got, wanted)
    warm = FeatureState.warm(huge.iloc[:6000])
    add_labels(warm, huge.iloc[6000:])
    late = HistoryIndex(huge).features(np.arange(6000, len(huge)), wanted.context)
    assert_same(stream(warm, transactions_of(huge)[6000:]), late)


def test_a_late_transaction_goes_to_its_place(table: pd.DataFrame) -> None:
    """Rows within a day may come in any order; those after them see the sorted history."""
    transactions = transactions_of(table)[:3000]
    rng = np.random.default_rng(0)
    arrival = np.argsort([t.time_ms + rng.integers(0, DAY_MS) for t in transactions])
    state = FeatureState(spare_rows=250)
    add_labels(state, table)
    seen: list[int] = []
    by_id = table.set_index("transaction_id", drop=False)
    for count, index in enumerate(arrival.tolist()):
        got = state.advance([transactions[index]], [True])
        seen.append(index)
        if count % 150 == 149:
            known = by_id.loc[seen].reset_index(drop=True)
            context = offline_context(known)
            assert_same(got, HistoryIndex(known).features(np.array([count]), context))
    assert (np.diff(arrival) < 0).any()


@pytest.mark.slow
def test_late_transactions_of_one_call_are_answered_as_one_by_one(table: pd.DataFrame) -> None:
    """An answer shows nothing of those after it in the call, even if their time is earlier."""
    transactions = transactions_of(table)[:3000]
    rng = np.random.default_rng(1)
    arrival = np.argsort([t.time_ms + rng.integers(0, DAY_MS) for t in transactions])
    arrived = [transactions[index] for index in arrival]
    together, single = FeatureState(spare_rows=250), FeatureState(spare_rows=250)
    wanted = join([single.advance([transaction], [True]) for transaction in arrived])
    assert_same(stream(together, arrived), wanted)


@pytest.mark.parametrize("days_late", [0.5, 1.5, 30, 37])
def test_ratios_behind_a_late_row_are_exact_for_38_days(
    table: pd.DataFrame, days_late: float
) -> None:
    """Although rows of the card are dropped; one that is later still may belong before those."""
    newest_ms = int(table["time_ms"].max())
    card = table["card"].value_counts().index[0]
    state = FeatureState.warm(table)
    kept = table["transaction_id"].isin(state.snapshot()["event_id"])
    assert not kept[table["card"] == card].all()
    late = Transaction(10**6, newest_ms - int(days_late * DAY_MS), card, "new", 10**6)
    last = Transaction(10**6 + 1, newest_ms + 1, card, "new", 100)
    state.advance([late], [False])
    got = FeatureState.restore(state.snapshot()).advance([last], [True])
    whole = pd.concat([table[COLUMNS].astype({"card": str, "terminal": str}), frame(late, last)])
    wanted = HistoryIndex(whole).features(np.array([len(table) + 1]), offline_context(whole))
    assert got.history[:, 6].tobytes() == wanted.history[:, 6].tobytes()


def frame(*transactions: Transaction) -> pd.DataFrame:
    return pd.DataFrame(
        [[getattr(t, name) for name in COLUMNS] for t in transactions], columns=COLUMNS
    )


def test_a_kept_row_keeps_its_ratio_when_a_later_one_is_dropped() -> None:
    """Row 2, kept by its terminal, is 30.00 after 10.00; row 3 of the card is dropped."""
    state = FeatureState()
    amounts, terminals = (1000, 3000, 9000), ("t", "rare", "t")
    for index in range(3):
        paid = Transaction(index + 1, NOW_MS + index, "c", terminals[index], amounts[index])
        state.advance([paid], [False])
    state.advance([pay(i, i, "c", "busy") for i in range(10, 30)], [False] * 20)
    state.advance([pay(i, i, f"c{i % 2}") for i in range(30, 70)], [False] * 40)
    state.advance([pay(70, 40 * 86_400, "c0")], [False])
    state.compact()
    assert [state.seen(identifier) for identifier in (1, 2, 3)] == [False, True, False]
    restored = FeatureState.restore(state.snapshot())
    got = restored.advance([pay(71, 40 * 86_400 + 1, "c0", "rare")], [True])
    assert got.history[-1, [0, 2, 6]].tolist() == [2.0, 30.0, 3.0]


def pay(identifier: int, seconds: float, card: str = "c", terminal: str = "t") -> Transaction:
    return Transaction(identifier, NOW_MS + int(seconds * 1000), card, terminal, 1000)


def value(features: Features, name: str, index: int = 0) -> float:
    return float(features.context[index, CONTEXT_NAMES.index(name)])


def test_a_tie_of_time_is_broken_by_id() -> None:
    """A late smaller id at the same second comes first and has seen nothing."""
    state = FeatureState()
    state.advance([pay(5, 0)], [True])
    late = state.advance([pay(3, 0)], [True])
    after = state.advance([pay(9, 0)], [True])
    assert value(late, "CT_SEEN") == 0
    assert np.isnan(value(late, "C_GAP"))
    assert value(after, "CT_SEEN") == 1
    assert value(after, "CUSTOMER_ID_NB_TX_1DAY_WINDOW") == 3


def test_a_late_first_visit_counts_for_what_lies_between() -> None:
    state = FeatureState()
    state.advance([pay(1, 100), pay(2, 50)], [False, False])
    assert value(state.advance([pay(3, 75)], [True]), "CT_SEEN") == 1
    assert value(state.advance([pay(4, 25)], [True]), "CT_SEEN") == 0


def test_an_early_label_counts_only_after_seven_days() -> None:
    state = FeatureState()
    state.add_label(Label(1, is_fraud=True))
    week = 7 * 86_400
    got = state.advance([pay(1, 0), pay(2, week - 1), pay(3, week)], [True] * 3)
    days = [value(got, "T_DAYS_SINCE_KNOWN_FRAUD", i) for i in range(3)]
    assert np.array_equal(days, [np.nan, np.nan, 7], equal_nan=True)


def test_a_label_can_be_taken_back() -> None:
    state = FeatureState()
    state.advance([pay(1, 0)], [False])
    state.add_label(Label(1, is_fraud=True))
    state.add_label(Label(1, is_fraud=True))
    state.add_label(Label(1, is_fraud=False))
    got = state.advance([pay(2, 8 * 86_400)], [True])
    assert np.isnan(value(got, "T_DAYS_SINCE_KNOWN_FRAUD"))
    assert value(got, "TERMINAL_ID_RISK_7DAY_WINDOW") == 0
    assert got.history[:, 4].sum() == 0


def test_the_oldest_label_without_a_transaction_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("apps.fraud.state.MAX_PENDING_LABELS", 2)
    state = FeatureState()
    for identifier in (1, 2, 1, 3):
        state.add_label(Label(identifier, is_fraud=True))
    assert state.snapshot()["pending_id"].tolist() == [1, 3]


def test_a_repeated_id_is_refused_and_changes_nothing() -> None:
    state = FeatureState()
    state.advance([pay(1, 0)], [True])
    before = state.snapshot()
    for batch in ([pay(2, 1), pay(1, 2)], [pay(3, 1), pay(3, 2)]):
        with pytest.raises(ValueError, match="again"):
            state.advance(batch, [True, True])
    with pytest.raises(ValueError, match="owned"):
        state.advance([pay(2, 1)], [])
    after = state.snapshot()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert state.seen(1)
    assert not state.seen(2)


def test_what_no_window_and_no_list_can_show_is_forgotten() -> None:
    state = FeatureState()
    state.advance([pay(i, i, f"c{i}") for i in range(100)], [False] * 100)
    state.advance([pay(200, 40 * 86_400, "c1", "t2")], [False])
    state.compact()
    assert state.seen(1)  # the last row of its card
    state = FeatureState()
    state.advance([pay(i, i) for i in range(100)], [False] * 100)
    state.advance([pay(200, 40 * 86_400)], [False])
    state.compact()
    assert not state.seen(68)
    assert state.seen(69)  # among the terminal's last 32
    got = state.advance([pay(201, 40 * 86_400 + 1)], [True])
    assert value(got, "C_PREV_MAX") == 10.0
    assert value(got, "C_RATIO_ALL") == 1.0


def test_the_last_fraud_of_a_terminal_outlives_its_row() -> None:
    state, day = FeatureState(), 86_400
    state.advance([pay(i, i * day / 4) for i in range(60)], [False] * 60)
    for fraud in (4, 9, 12, 2):  # day 3 is the last
        state.add_label(Label(fraud, is_fraud=True))
    for later in (60, 120):
        state.advance([pay(later, later * day)], [False])
        state.compact()
        assert not state.seen(12)
        got = FeatureState.restore(state.snapshot()).advance([pay(999, later * day + 1)], [True])
        assert value(got, "T_DAYS_SINCE_KNOWN_FRAUD") == later - 3


def test_a_state_without_events_gives_empty_features() -> None:
    state = FeatureState.restore(FeatureState().snapshot())
    got = state.advance([], [])
    assert got.context.shape == (0, 24)
    assert got.history.shape == (0, 7)
    assert got.cu_seqlens.tolist() == [0]
    assert state.newest_ms == 0
