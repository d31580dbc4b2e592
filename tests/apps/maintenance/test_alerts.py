"""Alerts through hysteresis, cool-down and acknowledgement."""

import pytest

from apps.maintenance.alerts import HOUR_S, AlertBook, AlertRule, Outlook, Stage

RULE = AlertRule(raise_at=0.5, clear_below=0.3, clear_hours=6, cool_down_hours=12)


def outlook(hour: float, chance: float, component: str = "pump") -> Outlook:
    return Outlook(
        machine="M1",
        component=component,
        moment_s=hour * HOUR_S,
        chance=chance,
        lead_hours=(30.0, 38.0, 46.0),
        contributions={"current": 0.2, "pressure": 2.5},
        model_version="forecast-1",
    )


def test_an_alert_begins_once_and_outlasts_a_dip() -> None:
    book = AlertBook(RULE)
    assert book.see(outlook(0, 0.4)) is None
    begun = book.see(outlook(3, 0.6))
    assert begun is not None
    assert begun.stage is Stage.RAISED
    assert [book.see(outlook(h, p)) for h, p in ((6, 0.9), (9, 0.4), (12, 0.1))] == [None] * 3
    assert book.see(outlook(15, 0.35)) is None  # back above the lower threshold
    assert book.see(outlook(18, 0.1)) is None
    assert book.see(outlook(21, 0.1)) is None
    ended = book.see(outlook(24, 0.1))
    assert ended is not None
    assert (ended.stage, ended.ended_s, ended.raised_s) == (
        Stage.CLEARED,
        24 * HOUR_S,
        3 * HOUR_S,
    )
    assert book.open == []


def test_after_an_end_the_component_is_quiet_for_a_while_and_others_are_not() -> None:
    book = AlertBook(RULE)
    book.see(outlook(0, 0.9))
    book.see(outlook(3, 0.0))
    assert book.see(outlook(9, 0.0)) is not None
    assert book.see(outlook(15, 0.9)) is None
    assert book.see(outlook(15, 0.9, "drive")) is not None
    assert book.see(outlook(21, 0.9)) is not None


def test_an_acknowledged_alert_goes_on_in_silence() -> None:
    book = AlertBook(RULE)
    book.see(outlook(0, 0.9))
    seen = book.acknowledge("M1", "pump", "Ada")
    assert (seen.stage, seen.acknowledged_by) == (Stage.ACKNOWLEDGED, "Ada")
    assert book.see(outlook(3, 0.95)) is None
    assert book.open[0].stage is Stage.ACKNOWLEDGED
    assert book.open[0].outlook.chance == 0.95
    with pytest.raises(KeyError, match="an open alert of drive on M1"):
        book.acknowledge("M1", "drive", "Ada")


def test_a_replacement_ends_an_alert_without_cool_down() -> None:
    book = AlertBook(RULE)
    book.see(outlook(0, 0.9))
    ended = book.repaired("M1", "pump", 5 * HOUR_S)
    assert ended is not None
    assert ended.stage is Stage.CLEARED
    assert book.repaired("M1", "pump", 5 * HOUR_S) is None
    assert book.see(outlook(6, 0.9)) is not None


def test_the_message_says_what_fails_when_and_why() -> None:
    begun = AlertBook(RULE).see(outlook(0, 0.75))
    assert begun is not None
    message = begun.as_message()
    assert message["component"] == "pump"
    assert message["lead_hours"] == 38.0
    assert message["interval_hours"] == [30.0, 46.0]
    assert list(message["contributions"]) == ["pressure", "current"]  # type: ignore[call-overload]


def test_thresholds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="clear_below <= raise_at"):
        AlertRule(raise_at=0.2, clear_below=0.4)
