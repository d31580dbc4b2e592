"""A plant."""

import pytest

from apps.maintenance.telemetry.plant import Plant

PLANT = Plant(
    period_s=600,
    sensors={"vibration": "mm/s", "current": "A"},
    errors=("E1", "E2"),
    components=("bearing", "drive"),
)


@pytest.fixture
def plant() -> Plant:
    return PLANT
