import numpy as np
import pytest

from apps.fraud.features import (
    CONTEXT_NAMES,
    DAY_MS,
    HOUR_MS,
    NUM_CARD_ROWS,
    NUM_CONTEXT,
    NUM_ROW_COLUMNS,
    NUM_TERMINAL_ROWS,
    Aggregates,
    Features,
    Ints,
    amount_ratio,
    derive,
)
from core_model import builtin_tasks

NOW_MS = 17_622 * DAY_MS  # 2018-04-01, a Sunday


def aggregates(**changes: int | float | list[int]) -> Aggregates:
    """Return one transaction of 12.00 after two of 10.00 and 20.00."""
    values: dict[str, int | float | list[int]] = {
        "time_ms": NOW_MS,
        "amount": 1200,
        "card_counts": [1, 2, 3],
        "card_totals": [1200, 3200, 4200],
        "terminal_counts": [0, 2, 4],
        "terminal_frauds": [0, 1, 1],
        "previous_count": 2,
        "previous_total": 3000,
        "previous_max": 2000,
        "card_gap_ms": 1500,
        "terminal_gap_ms": -1,
        "pair_seen": 1,
        "fraud_age_days": 9,
        "spread": 2.0 * (1000**2 + 2000**2) - 3000.0**2,
    }
    arrays: dict[str, Ints] = {
        name: np.array([value]) for name, value in (values | changes).items()
    }
    return Aggregates(**arrays)  # type: ignore[arg-type]  # spread is float64


def named(context: np.ndarray, name: str) -> float:
    return float(context[0, CONTEXT_NAMES.index(name)])


def test_names_are_the_handbooks_and_the_online_ones() -> None:
    assert len(CONTEXT_NAMES) == len(set(CONTEXT_NAMES)) == 24
    assert CONTEXT_NAMES[3:5] == (
        "CUSTOMER_ID_NB_TX_1DAY_WINDOW",
        "CUSTOMER_ID_AVG_AMOUNT_1DAY_WINDOW",
    )
    assert CONTEXT_NAMES[13:15] == (
        "TERMINAL_ID_NB_TX_30DAY_WINDOW",
        "TERMINAL_ID_RISK_30DAY_WINDOW",
    )


def test_widths_are_those_the_model_is_built_for() -> None:
    assert CONTEXT_NAMES == builtin_tasks.CONTEXT_COLUMNS
    assert len(CONTEXT_NAMES) == NUM_CONTEXT == builtin_tasks.NUM_CONTEXT
    assert NUM_ROW_COLUMNS == builtin_tasks.NUM_ROW_COLUMNS
    assert NUM_CARD_ROWS == builtin_tasks.NUM_CARD_ROWS
    assert NUM_TERMINAL_ROWS == builtin_tasks.NUM_TERMINAL_ROWS


def test_a_ratio_needs_an_earlier_amount() -> None:
    amounts, counts, totals = np.array([[900, 900, 900, 0], [0, 2, 2, 2], [0, 0, 1200, 1200]])
    ratios = amount_ratio(amounts, counts, totals, 100)
    assert np.array_equal(ratios, [np.nan, np.nan, 1.5, 0.0], equal_nan=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TX_AMOUNT", 12.0),
        ("TX_DURING_WEEKEND", 1.0),
        ("TX_DURING_NIGHT", 1.0),
        ("CUSTOMER_ID_AVG_AMOUNT_30DAY_WINDOW", 14.0),
        ("TERMINAL_ID_RISK_1DAY_WINDOW", 0.0),
        ("TERMINAL_ID_RISK_7DAY_WINDOW", 0.5),
        ("TERMINAL_ID_RISK_30DAY_WINDOW", 0.25),
        ("C_GAP", 1.5),
        ("T_GAP", np.nan),
        ("CT_SEEN", 1.0),
        ("C_RATIO_ALL", 12 / 15),
        ("C_RATIO30", 12 / 14),
        ("C_PREV_MAX", 20.0),
        ("C_OVERMAX", 0.6),
        ("C_Z", -3 / np.sqrt(50)),
        ("T_DAYS_SINCE_KNOWN_FRAUD", 9.0),
    ],
)
def test_each_feature_by_hand(name: str, value: float) -> None:
    assert named(derive(aggregates(), 100), name) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(("hour", "night"), [(0, 1), (6, 1), (7, 0), (23, 0)])
def test_night_ends_with_the_hour_six(hour: int, night: int) -> None:
    time_ms = NOW_MS + hour * HOUR_MS + HOUR_MS - 1
    assert named(derive(aggregates(time_ms=time_ms), 100), "TX_DURING_NIGHT") == night


def test_weekends_are_saturday_and_sunday() -> None:
    days = [
        named(derive(aggregates(time_ms=NOW_MS + day * DAY_MS), 100), "TX_DURING_WEEKEND")
        for day in range(7)
    ]
    assert days == [1, 0, 0, 0, 0, 0, 1]


def test_a_first_transaction_defines_nothing_earlier() -> None:
    first = aggregates(
        previous_count=0,
        previous_total=0,
        previous_max=0,
        card_gap_ms=-1,
        spread=0.0,
        fraud_age_days=-1,
    )
    context = derive(first, 100)
    undefined = [name for i, name in enumerate(CONTEXT_NAMES) if np.isnan(context[0, i])]
    assert undefined == [
        "C_GAP", "T_GAP", "C_RATIO_ALL", "C_PREV_MAX", "C_OVERMAX", "C_Z",
        "T_DAYS_SINCE_KNOWN_FRAUD",
    ]  # fmt: skip


def test_results_do_not_depend_on_the_length_of_the_arrays() -> None:
    rng = np.random.default_rng(0)
    many = Aggregates(
        **{name: np.repeat(column, 37, axis=0) for name, column in aggregates()._asdict().items()}
    )
    many = many._replace(amount=rng.integers(0, 10**6, 37), spread=rng.random(37) * 1e9)
    together = derive(many, 100)
    for i in range(37):
        alone = Aggregates(**{name: column[i : i + 1] for name, column in many._asdict().items()})
        assert derive(alone, 100).tobytes() == together[i].tobytes()


def test_a_digest_names_the_bits_of_one_transaction() -> None:
    rng = np.random.default_rng(0)
    context = rng.random((2, 24))
    history = rng.random((5, NUM_ROW_COLUMNS)).astype(np.float32)
    features = Features(context, history, np.array([0, 2, 5], np.int32))
    other = Features(context[1:], history[2:], np.array([0, 3], np.int32))
    assert features.digest(1) == other.digest(0) != features.digest(0)
    assert len(features.digest(0)) == 16
    other.history[2, 1] = np.nextafter(other.history[2, 1], np.float32(2))
    assert features.digest(1) == other.digest(0)  # a view of the same rows
    assert Features(context[1:], history[2:] * 2, other.cu_seqlens).digest(0) != other.digest(0)
