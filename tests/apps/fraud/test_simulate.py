from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest

from apps.fraud.features import DAY_MS
from apps.fraud.simulate import LARGE_AMOUNT_MINOR, SimulationConfig, simulate

CONFIG = SimulationConfig(
    num_cards=800, num_terminals=1600, num_days=60, start=date(2024, 2, 1), seed=3
)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return simulate(CONFIG)


def test_the_same_seed_gives_the_same_table(table: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(simulate(CONFIG), table)


def test_rows_are_in_time_order_within_the_days(table: pd.DataFrame) -> None:
    start_ms = int(datetime(2024, 2, 1, tzinfo=UTC).timestamp()) * 1000
    assert table["time_ms"].is_monotonic_increasing
    assert table["time_ms"].between(start_ms, start_ms + 60 * DAY_MS - 1).all()
    assert table["transaction_id"].tolist() == list(range(len(table)))


def test_cards_pay_about_twice_a_day_around_noon(table: pd.DataFrame) -> None:
    inside = 0.969  # share of a normal with sd 20000 s that stays within the day
    assert len(table) / (800 * 60) == pytest.approx(2 * inside, rel=0.1)
    second = table["time_ms"] // 1000 % 86_400
    assert second.mean() == pytest.approx(43_200, rel=0.02)
    assert 17_000 < second.std() < 20_000


def test_frauds_have_their_scenarios(table: pd.DataFrame) -> None:
    scenario, amount = table["TX_FRAUD_SCENARIO"], table["amount_minor"]
    assert ((scenario > 0) == (table["TX_FRAUD"] == 1)).all()
    assert set(scenario) == {0, 1, 2, 3}
    assert (amount[scenario == 1] > LARGE_AMOUNT_MINOR).all()
    assert (amount[scenario == 0] <= LARGE_AMOUNT_MINOR).all()
    assert (amount[scenario == 3] % 5 == 0).all()
    assert amount[scenario == 3].mean() > 3 * amount[scenario == 0].mean()
    assert 0.004 < table["TX_FRAUD"].mean() < 0.02


def test_a_compromised_terminal_is_fraud_for_everybody_for_28_days(table: pd.DataFrame) -> None:
    day = table["time_ms"] // DAY_MS
    at_it = table.assign(hit=table["TX_FRAUD_SCENARIO"] == 2).groupby(
        [table["terminal"].astype(str), day]
    )
    compromised = at_it["hit"].transform("any")
    assert (table.loc[compromised, "TX_FRAUD"] == 1).all()
    hit = table[compromised]
    length = day[compromised].groupby(hit["terminal"].astype(str)).agg(["min", "max"])
    days = length["max"] - length["min"] + 1
    assert 20 < days[days <= 28].median() <= 28


def test_a_card_stays_within_its_reach(table: pd.DataFrame) -> None:
    terminals = table.groupby("card", observed=True)["terminal"].nunique()
    assert terminals.max() < 40  # 1600 terminals * pi 5^2 / 100^2 = 12.6 on average


@pytest.mark.parametrize(
    "changes", [{"num_cards": 0}, {"num_days": -1}, {"radius": 0.0}, {"cards_per_day": -1.0}]
)
def test_impossible_sizes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        SimulationConfig(**changes)


def test_without_compromises_only_large_amounts_are_fraud() -> None:
    config = SimulationConfig(100, 100, 20, 20.0, terminals_per_day=0.0, cards_per_day=0.0)
    table = simulate(config)
    assert np.array_equal(table["TX_FRAUD"] == 1, table["amount_minor"] > LARGE_AMOUNT_MINOR)
