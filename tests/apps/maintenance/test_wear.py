"""Wear features: of the past only, and of a unit alone."""

import numpy as np
import pytest

from apps.maintenance.cmapss import Table
from apps.maintenance.wear import learn_wear, wear_features

CYCLES = 80


def units(num: int, seed: int) -> Table:
    """Return units that wear at their own pace under two operating points."""
    rng = np.random.default_rng(seed)
    unit = np.repeat(np.arange(num), CYCLES)
    cycle = np.tile(np.arange(1, CYCLES + 1), num)
    regime = rng.integers(0, 2, unit.size)
    settings = np.stack([regime * 20.0, regime * 0.5], axis=1)
    wear = cycle * rng.uniform(0.5, 2.0, num)[unit]
    sensors = np.stack([100 * regime + wear, 500 - 50 * regime - wear], axis=1)
    sensors = sensors + rng.normal(0, 0.5, sensors.shape)
    rul = (CYCLES - cycle).astype(np.float64)
    return Table(unit, cycle, settings, sensors, ("sensor_1", "sensor_2"), rul)


@pytest.fixture(scope="module")
def train() -> Table:
    return units(12, 0)


def test_the_future_of_a_unit_changes_nothing_before_it(train: Table) -> None:
    wear = learn_wear(train)
    whole = wear_features(train, wear)
    sensors = train.sensors.copy()
    sensors[train.cycle > 50] += 1000.0
    changed = Table(train.unit, train.cycle, train.settings, sensors, train.sensor_names, train.rul)
    past = train.cycle <= 50
    np.testing.assert_allclose(wear_features(changed, wear)[past], whole[past], rtol=1e-4)


def test_a_unit_knows_nothing_of_another(train: Table) -> None:
    wear = learn_wear(train)
    mine = train.unit == 3
    alone = Table(
        train.unit[mine],
        train.cycle[mine],
        train.settings[mine],
        train.sensors[mine],
        train.sensor_names,
        train.rul[mine],
    )
    np.testing.assert_allclose(
        wear_features(alone, wear), wear_features(train, wear)[mine], rtol=1e-3, atol=1e-4
    )
