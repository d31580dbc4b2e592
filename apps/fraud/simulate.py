"""Simulated card transactions with three kinds of fraud, seeded.

Written from the published description of the handbook's simulator: customers and terminals
lie in a square of 100 x 100; a customer pays at random terminals within a radius, a Poisson
number of times a day, around noon, with normal amounts.  Fraud: large amounts (scenario 1),
compromised terminals (2), compromised cards (3).  Simulated, so no result on it says anything
about real cards.

Source:
    Le Borgne, Siblini, Lebichot, Bontempi: Reproducible Machine Learning for Credit Card
    Fraud Detection - Practical Handbook, chapter 3, "Transaction data simulator" (the text).

Legend: C cards, M terminals, N transactions.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime

import numpy as np
import pandas as pd
from numpy.random import Generator
from numpy.typing import NDArray

from apps.fraud.features import Floats, Ints
from apps.fraud.table import LABEL_COLUMN, SCENARIO_COLUMN

SQUARE = 100.0  # side of the map, in the handbook's units of distance
MEAN_AMOUNTS = (5.0, 100.0)  # currency units; the standard deviation is half the mean
MAX_PER_DAY = 4.0  # mean transactions of a card per day: uniform from 0
NOON_S = 43_200
SPREAD_S = 20_000  # standard deviation of the time of day; what leaves the day is discarded
LARGE_AMOUNT_MINOR = 22_000  # scenario 1: above it
TERMINAL_DAYS = 28  # scenario 2: so long is every payment at the terminal fraud
CARD_DAYS = 14  # scenario 3: so long is a third of the card's payments fraud
CARD_SHARE = 1 / 3
CARD_FACTOR = 5  # by which those payments are larger
_MINOR_UNITS = 100
_DAY_S = 86_400
_CARDS_AT_ONCE = 500  # bounds the memory for distances


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """Size and seed of a simulation; the defaults are the handbook's.

    Args:
        num_cards: Customers; those without a terminal in reach never pay.
        num_terminals: Terminals.
        num_days: Days.
        radius: Reach of a customer.
        start: First day, UTC.
        terminals_per_day: Newly compromised per day, per 10,000 terminals.
        cards_per_day: Newly compromised per day, per 5,000 cards.
        seed: Of the random numbers.
    """

    num_cards: int = 5000
    num_terminals: int = 10_000
    num_days: int = 183
    radius: float = 5.0
    start: date = date(2018, 4, 1)
    terminals_per_day: float = 2.0
    cards_per_day: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_cards", "num_terminals", "num_days", "radius"):
            if getattr(self, name) <= 0:
                message = f"expected {name} above 0, got {getattr(self, name)}"
                raise ValueError(message)
        for name in ("terminals_per_day", "cards_per_day"):
            if getattr(self, name) < 0:
                message = f"expected {name} of at least 0, got {getattr(self, name)}"
                raise ValueError(message)


def simulate(config: SimulationConfig) -> pd.DataFrame:
    """Return a canonical table with TX_FRAUD and TX_FRAUD_SCENARIO, ids from 0 in time order."""
    rng = np.random.default_rng(config.seed)
    card, time_s = _payment_times(config, rng)
    means = rng.uniform(*MEAN_AMOUNTS, config.num_cards)
    terminal = _choose_terminals(config, card, rng)
    reached = terminal >= 0
    card, time_s, terminal = card[reached], time_s[reached], terminal[reached]
    order = np.argsort(time_s, kind="stable")
    card, time_s, terminal = card[order], time_s[order], terminal[order]
    amount = _amounts(means[card], rng)
    scenario = np.where(amount > LARGE_AMOUNT_MINOR, 1, 0)
    day = time_s // _DAY_S
    scenario[_compromised_terminals(config, terminal, day, rng)] = 2
    stolen = _stolen_cards(config, card, day, rng)
    scenario[stolen] = 3
    amount[stolen] *= CARD_FACTOR
    start_ms = int(datetime(*config.start.timetuple()[:3], tzinfo=UTC).timestamp()) * 1000
    return pd.DataFrame(
        {
            "transaction_id": np.arange(card.size),
            "time_ms": start_ms + time_s * 1000,
            "card": _named(card, config.num_cards),
            "terminal": _named(terminal, config.num_terminals),
            "amount_minor": amount,
            LABEL_COLUMN: (scenario > 0).astype(np.int8),
            SCENARIO_COLUMN: scenario.astype(np.int8),
        }
    )


def _payment_times(config: SimulationConfig, rng: Generator) -> tuple[Ints, Ints]:
    """Return card and second since the start of payments, [N] each."""
    per_day = rng.uniform(0, MAX_PER_DAY, config.num_cards)
    counts = rng.poisson(per_day[:, None], (config.num_cards, config.num_days))
    card = np.repeat(np.arange(config.num_cards), counts.sum(axis=1))
    day = np.repeat(np.tile(np.arange(config.num_days), config.num_cards), counts.ravel())
    second = rng.normal(NOON_S, SPREAD_S, card.size).astype(np.int64)
    inside = (second > 0) & (second < _DAY_S)
    return card[inside], (day * _DAY_S + second)[inside]


def _choose_terminals(config: SimulationConfig, card: Ints, rng: Generator) -> Ints:
    """Return a random terminal within reach of each payment's card, -1 if there is none, [N]."""
    homes = rng.uniform(0, SQUARE, (config.num_cards, 2))
    places = rng.uniform(0, SQUARE, (config.num_terminals, 2))
    parts = [
        np.nonzero(_distances(homes[first : first + _CARDS_AT_ONCE], places) < config.radius)
        for first in range(0, config.num_cards, _CARDS_AT_ONCE)
    ]
    in_reach = np.concatenate([terminals for _, terminals in parts])
    counts = np.concatenate(
        [
            np.bincount(cards, minlength=min(_CARDS_AT_ONCE, config.num_cards - first))
            for (cards, _), first in zip(
                parts, range(0, config.num_cards, _CARDS_AT_ONCE), strict=True
            )
        ]
    )
    starts = np.cumsum(counts) - counts
    drawn = rng.random(card.size)
    choice = starts[card] + (drawn * counts[card]).astype(np.int64)
    reached = counts[card] > 0
    terminal = np.full(card.size, -1)
    terminal[reached] = in_reach[choice[reached]]
    return terminal


def _distances(homes: Floats, places: Floats) -> Floats:
    return np.hypot(*(homes[:, None, axis] - places[None, :, axis] for axis in (0, 1)))


def _amounts(means: Floats, rng: Generator) -> Ints:
    amount = rng.normal(means, means / 2)
    amount = np.where(amount < 0, rng.uniform(0, 2 * means), amount)
    return np.rint(amount * _MINOR_UNITS).astype(np.int64)


def _daily(rate: float, num_days: int, population: int, rng: Generator) -> list[Ints]:
    """Draw members of a population for each day; fractions add up over the days."""
    totals = np.floor(np.arange(num_days + 1) * rate + 1e-9).astype(np.int64)
    return [
        rng.choice(population, min(int(count), population), replace=False)
        for count in np.diff(totals)
    ]


def _compromised(
    drawn: list[Ints], population: int, num_days: int, lasting: int
) -> NDArray[np.bool_]:
    """Return whether a member is compromised on a day, [population, days]."""
    state = np.zeros((population, num_days), np.bool_)
    for day, members in enumerate(drawn):
        state[members, day : day + lasting] = True
    return state


def _compromised_terminals(
    config: SimulationConfig, terminal: Ints, day: Ints, rng: Generator
) -> NDArray[np.bool_]:
    rate = config.terminals_per_day * config.num_terminals / 10_000
    drawn = _daily(rate, config.num_days, config.num_terminals, rng)
    state = _compromised(drawn, config.num_terminals, config.num_days, TERMINAL_DAYS)
    return state[terminal, day]


def _stolen_cards(
    config: SimulationConfig, card: Ints, day: Ints, rng: Generator
) -> NDArray[np.bool_]:
    rate = config.cards_per_day * config.num_cards / 5000
    drawn = _daily(rate, config.num_days, config.num_cards, rng)
    state = _compromised(drawn, config.num_cards, config.num_days, CARD_DAYS)
    return state[card, day] & (rng.random(card.size) < CARD_SHARE)


def _named(numbers: Ints, population: int) -> pd.Categorical:
    names = pd.Index([str(number) for number in range(population)], dtype=object)
    return pd.Categorical.from_codes(numbers, names)
