"""What the intake says of messages is the same however they are batched."""

import json
from pathlib import Path

import pytest

from apps.maintenance.telemetry.intake import REJECTED, Intake
from apps.maintenance.telemetry.messages import Message
from apps.maintenance.telemetry.plant import Plant

MINUTES = (0, 20, 10, 20, 5, 30)  # two out of order, one twice


def payload(minute: int) -> bytes:
    return json.dumps(
        {"time": f"2026-01-01T00:{minute:02}:00Z", "values": {"current": 1.0}}
    ).encode()


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_order_is_judged_alike_in_small_and_large_batches(
    plant: Plant, tmp_path: Path, batch: int
) -> None:
    intake = Intake(plant, "plant", tmp_path / REJECTED, lambda: 1767229200.0)
    for start in range(0, len(MINUTES), batch):
        found = [
            intake.take("plant/M1/telemetry", payload(m)) for m in MINUTES[start : start + batch]
        ]
        intake.settle([m for m in found if m is not None], is_kept=True)
    assert intake.counts == {"received": 6, "kept": 5, "duplicate": 1, "out_of_order": 2}


def test_what_did_not_reach_the_disk_sets_no_order(plant: Plant, tmp_path: Path) -> None:
    intake = Intake(plant, "plant", tmp_path / REJECTED, lambda: 1767229200.0)
    lost = intake.take("plant/M1/telemetry", payload(20))
    assert isinstance(lost, Message)
    intake.settle([lost], is_kept=False)
    intake.take("plant/M1/telemetry", payload(10))
    assert intake.counts == {"received": 2}
