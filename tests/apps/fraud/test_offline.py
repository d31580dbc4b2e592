"""The vectorised execution against the written definitions, one row at a time."""

from pathlib import Path
from statistics import stdev
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from apps.fraud.features import CONTEXT_NAMES
from apps.fraud.offline import HistoryIndex, offline_context, write_features

DAY_MS = 86_400_000


class Row(NamedTuple):
    time_ms: int
    identifier: int
    card: str
    terminal: str
    amount: int
    fraud: int


def random_table(
    seed: int, num_rows: int, *, num_days: float = 60, largest: int = 40_000
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    times = rng.integers(0, int(num_days * 48), num_rows) * (DAY_MS // 48)  # many ties
    return pd.DataFrame(
        {
            "transaction_id": rng.permutation(num_rows * 2)[:num_rows],
            "time_ms": times + 17_622 * DAY_MS,
            "card": [f"c{i}" for i in rng.integers(0, 4, num_rows)],
            "terminal": [f"t{i}" for i in rng.integers(0, 3, num_rows)],
            "amount_minor": rng.integers(0, largest, num_rows) * rng.integers(0, 2, num_rows),
            "TX_FRAUD": rng.integers(0, 5, num_rows) == 0,
        }
    ).astype({"TX_FRAUD": np.int8})


def rows_of(table: pd.DataFrame) -> list[Row]:
    columns = ["time_ms", "transaction_id", "card", "terminal", "amount_minor", "TX_FRAUD"]
    return [
        Row(*values) for values in zip(*(table[name].tolist() for name in columns), strict=True)
    ]


def over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")


def context_by_definition(row: Row, table: list[Row]) -> list[float]:
    """Return the 24 features of facts/fraud.md 4.1 and 4.4, straight from the text."""
    mine = [r for r in table if r.card == row.card and r[:2] <= row[:2]]
    before = [r for r in mine if r != row]
    there = [r for r in table if r.terminal == row.terminal]
    earlier = [r for r in there if r[:2] < row[:2]]
    known = [r for r in there if r.time_ms <= row.time_ms - 7 * DAY_MS]
    moment = pd.Timestamp(row.time_ms, unit="ms")
    out = [row.amount / 100, float(moment.weekday() >= 5), float(moment.hour <= 6)]
    for days in (1, 7, 30):
        window = [r.amount for r in mine if r.time_ms > row.time_ms - days * DAY_MS]
        out += [len(window), sum(window) / len(window) / 100]
    average_30 = out[8]
    for days in (1, 7, 30):
        delayed = [r.fraud for r in known if r.time_ms > row.time_ms - (7 + days) * DAY_MS]
        out += [len(delayed), sum(delayed) / len(delayed) if delayed else 0]
    amounts = [r.amount / 100 for r in before]
    mean = over(sum(amounts), len(amounts))
    largest = max(amounts, default=float("nan"))
    out += [(row.time_ms - max(r.time_ms for r in before)) / 1000 if before else float("nan")]
    out += [(row.time_ms - max(r.time_ms for r in earlier)) / 1000 if earlier else float("nan")]
    out += [float(any(r.terminal == row.terminal for r in before))]
    out += [over(row.amount / 100, mean), over(row.amount / 100, average_30)]
    out += [largest, over(row.amount / 100, largest)]
    spread = stdev(r.amount for r in before) / 100 if len(before) > 1 else 0.0
    out += [over(row.amount / 100 - mean, spread)]
    last = max((r.time_ms // DAY_MS for r in known if r.fraud), default=None)
    return [*out, float("nan") if last is None else row.time_ms // DAY_MS - last]


def ratio_by_definition(row: Row, table: list[Row]) -> float:
    earlier = [r.amount for r in table if r.card == row.card and r[:2] < row[:2]]
    return over(row.amount / 100, over(sum(earlier), len(earlier)) / 100)


def history_by_definition(row: Row, table: list[Row]) -> list[list[float]]:
    before = sorted((r for r in table if r[:2] < row[:2]), reverse=True)
    of_card = [(1, r) for r in before if r.card == row.card][:16]
    of_terminal = [(2, r) for r in before if r.terminal == row.terminal][:32]
    out = [[0.0, 0.0, row.amount / 100, 0.0, 0.0, 0.0, ratio_by_definition(row, table)]]
    for kind, r in of_card + of_terminal:
        matured = r.time_ms <= row.time_ms - 7 * DAY_MS
        same = r.card == row.card and r.terminal == row.terminal
        age_s = (row.time_ms - r.time_ms) / 1000
        ratio = ratio_by_definition(r, table)
        out.append([kind, age_s, r.amount / 100, matured, matured and r.fraud, same, ratio])
    return out


@pytest.mark.parametrize(("seed", "num_rows"), [(0, 1), (1, 2), (2, 40), (3, 150), (4, 300)])
def test_context_follows_the_written_definitions(seed: int, num_rows: int) -> None:
    table = random_table(seed, num_rows)
    rows = rows_of(table)
    expected = np.array([context_by_definition(row, rows) for row in rows])
    np.testing.assert_allclose(offline_context(table), expected, rtol=1e-9, atol=1e-9)


def test_history_follows_the_written_definitions() -> None:
    table = random_table(5, 250)
    rows = rows_of(table)
    chosen = np.random.default_rng(0).permutation(250)[:120]
    features = HistoryIndex(table).features(chosen, offline_context(table))
    for index, row in enumerate(chosen):
        start, end = features.cu_seqlens[index : index + 2]
        expected = np.array(history_by_definition(rows[row], rows), np.float32)
        np.testing.assert_array_equal(features.history[start:end, :6], expected[:, :6])
        np.testing.assert_allclose(features.history[start:end, 6], expected[:, 6], rtol=1e-6)


def test_the_ratio_of_a_row_is_its_own_context() -> None:
    """Every row of a history carries the C_RATIO_ALL of its transaction, bit for bit."""
    table = random_table(14, 300)
    context = offline_context(table)
    features = HistoryIndex(table).features(np.arange(300), context)
    own = context[:, CONTEXT_NAMES.index("C_RATIO_ALL")].astype(np.float32)
    order = np.lexsort((table["transaction_id"], table["time_ms"]))
    place = np.argsort(order)
    for entity, kind, most in (("card", 1, 16), ("terminal", 2, 32)):
        names = table[entity].to_numpy()
        for index in range(300):
            rows = features.history[slice(*features.cu_seqlens[index : index + 2])]
            before = order[: place[index]]
            earlier = before[names[before] == names[index]][::-1][:most]
            assert rows[rows[:, 0] == kind, 6].tobytes() == own[earlier].tobytes()
            assert rows[0, 6].tobytes() == own[index].tobytes()
    assert np.isnan(own).any()


def test_huge_amounts_stay_exact() -> None:
    """Sums of squares beyond int64 come from Python's integers."""
    table = random_table(6, 120, largest=2**40)
    small = table["amount_minor"] % 1000
    table["amount_minor"] = small.where(small % 2 == 0, 2**40 - 1 - small)
    rows = rows_of(table)
    expected = [context_by_definition(row, rows)[22] for row in rows]
    np.testing.assert_allclose(offline_context(table)[:, 22], expected, rtol=1e-9)


def test_equal_amounts_have_no_z() -> None:
    table = random_table(7, 30).assign(amount_minor=12_345)
    assert np.isnan(offline_context(table)[:, 22]).all()


def test_a_label_counts_from_exactly_seven_days_on() -> None:
    times = np.array([0, 7 * DAY_MS - 1, 7 * DAY_MS]) + 17_622 * DAY_MS
    table = random_table(8, 3).assign(
        time_ms=times, transaction_id=[1, 2, 3], terminal="t", TX_FRAUD=1
    )
    context = offline_context(table)
    days = context[:, CONTEXT_NAMES.index("T_DAYS_SINCE_KNOWN_FRAUD")]
    assert np.array_equal(days, [np.nan, np.nan, 7], equal_nan=True)
    assert context[:, CONTEXT_NAMES.index("TERMINAL_ID_NB_TX_1DAY_WINDOW")].tolist() == [0, 0, 1]


def test_a_later_label_or_row_changes_nothing_earlier() -> None:
    table = random_table(9, 200).sort_values(["time_ms", "transaction_id"], ignore_index=True)
    context = offline_context(table)
    for cut in (1, 77, 150):
        head = table.iloc[:cut].copy()
        fresh = head["time_ms"] > head["time_ms"].iloc[-1] - 7 * DAY_MS
        head.loc[fresh, "TX_FRAUD"] = 0  # not known yet at the last of them
        assert offline_context(head)[-1].tobytes() == context[cut - 1].tobytes()


def test_row_order_of_the_table_does_not_matter() -> None:
    table = random_table(10, 200)
    shuffled = table.sample(frac=1, random_state=1)
    context = offline_context(table)[shuffled.index.to_numpy()]
    assert offline_context(shuffled).tobytes() == context.tobytes()


def test_string_ids_break_ties_by_code_point() -> None:
    table = random_table(11, 2).assign(
        time_ms=17_622 * DAY_MS, transaction_id=["9", "10"], card="c", amount_minor=[100, 300]
    )
    assert offline_context(table)[:, 5].tolist() == [2, 1]  # "10" < "9"
    table["transaction_id"] = [9, 10]
    assert offline_context(table)[:, 5].tolist() == [1, 2]


def test_an_empty_table_has_no_features() -> None:
    assert offline_context(random_table(0, 1).iloc[:0]).shape == (0, 24)


def test_without_labels_no_fraud_is_known() -> None:
    table = random_table(12, 100)
    context = offline_context(table.drop(columns="TX_FRAUD"))
    assert np.isnan(context[:, 23]).all()
    assert (context[:, 10:15:2] == 0).all()


def test_a_file_becomes_a_file_of_named_features(tmp_path: Path) -> None:
    table = random_table(13, 50).sort_values(["time_ms", "transaction_id"], ignore_index=True)
    raw = pd.DataFrame(
        {
            "TRANSACTION_ID": table["transaction_id"],
            "TX_DATETIME": pd.to_datetime(table["time_ms"], unit="ms"),
            "CUSTOMER_ID": table["card"],
            "TERMINAL_ID": table["terminal"],
            "TX_AMOUNT": table["amount_minor"] / 100,
            "TX_FRAUD": table["TX_FRAUD"],
        }
    )
    raw.to_parquet(tmp_path / "in.parquet")
    assert write_features(tmp_path / "in.parquet", tmp_path / "out.parquet") == 50
    out = pd.read_parquet(tmp_path / "out.parquet")
    assert list(out.columns) == ["TRANSACTION_ID", *CONTEXT_NAMES]
    assert out["TRANSACTION_ID"].tolist() == table["transaction_id"].tolist()
    assert out[list(CONTEXT_NAMES)].to_numpy().tobytes() == offline_context(table).tobytes()
