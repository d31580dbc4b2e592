"""How the time between two requests follows what the model takes."""

import pytest

from apps.fraud.pace import SPACING, Pace


def test_gap_settles_at_a_multiple_of_the_round_trip() -> None:
    pace = Pace()
    for _ in range(100):
        pace.observe(40.0)
    assert pace.gap_ms == pytest.approx(SPACING * 40.0)


def test_gap_shrinks_again_when_the_model_gets_faster() -> None:
    pace = Pace(spacing=1.5)
    for round_trip_ms in [60.0] * 50 + [2.0] * 50:
        pace.observe(round_trip_ms)
    assert pace.gap_ms == pytest.approx(3.0, rel=0.01)


def test_one_slow_answer_holds_the_stream_back_for_a_tenth_of_a_second_at_most() -> None:
    pace = Pace()
    pace.observe(1e6)
    assert pace.gap_ms == 100.0
