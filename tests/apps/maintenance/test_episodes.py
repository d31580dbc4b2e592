"""Hours to failure, events, leads and false episodes, counted by hand on two machines."""

import numpy as np

from apps.maintenance.fleet import Records
from apps.maintenance.protocol import (
    NEVER,
    Events,
    Forecasts,
    Rows,
    failure_events,
    false_episodes,
    hours_to_failure,
    leads,
    machine_months,
    metrics,
)

FAILURES = Records(
    machine=np.array([0, 0, 0, 1]), hour=np.array([10, 10, 40, 20]), kind=np.array([0, 1, 0, 1])
)


def rows(*pairs: tuple[int, int]) -> Rows:
    machine, hour = zip(*pairs, strict=True)
    return Rows(np.array(machine), np.array(hour))


def test_hours_count_to_the_next_failure_strictly_after_the_row() -> None:
    asked = rows((0, 9), (0, 10), (0, 40), (1, 0))
    assert hours_to_failure(FAILURES, asked, 2).tolist() == [
        [1, 1],
        [30, NEVER],  # the failures of the row's own hour are over
        [NEVER, NEVER],
        [NEVER, 20],
    ]


def test_two_components_in_one_hour_are_one_event() -> None:
    events = failure_events(FAILURES, rows((0, 3), (1, 3)), after=9)
    assert list(zip(events.machine.tolist(), events.hour.tolist(), strict=True)) == [
        (0, 10),
        (0, 40),
        (1, 20),
    ]
    assert failure_events(FAILURES, rows((0, 3)), after=10).hour.tolist() == [40]


def test_a_lead_is_the_earliest_alarm_within_the_horizon() -> None:
    asked = rows((0, 6), (0, 9), (0, 16), (0, 19), (0, 28), (1, 16), (1, 20))
    alarm = np.array([True, True, True, False, False, False, True])
    events = Events(np.array([0, 0, 1]), np.array([10, 40, 20]))
    assert leads(asked, alarm, events, 4).tolist() == [4, 0, 0]  # an alarm at the failure is late
    assert leads(asked, alarm, events, 24).tolist() == [4, 24, 0]
    assert leads(asked, np.zeros(7, bool), events, 24).tolist() == [0, 0, 0]


def test_alarms_six_hours_apart_are_one_episode_and_true_if_one_row_is() -> None:
    asked = rows((0, 0), (0, 6), (0, 13), (1, 13), (1, 16))
    everywhere = np.ones(5, bool)
    assert false_episodes(asked, everywhere, np.array([0, 0, 0, 0, 0])) == 3
    assert false_episodes(asked, everywhere, np.array([0, 2, 0, 0, 0])) == 2
    assert false_episodes(asked, everywhere, np.array([0, 2, 1, 0, 3])) == 0
    assert false_episodes(asked, np.zeros(5, bool), np.zeros(5, np.int64)) == 0


def test_a_row_stands_for_three_hours_of_a_machine() -> None:
    month = rows(*[(0, 3 * i) for i in range(244)])  # 30.5 days
    assert round(machine_months(month), 3) == 1.002


def test_a_lead_above_the_horizon_is_not_a_figure() -> None:
    asked = rows((0, 4), (0, 7), (0, 13), (0, 22))
    truth = np.array([0, 1, 0, 0])
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.1, 0.9]])
    events = Events(np.array([0]), np.array([10]))
    found = metrics(Forecasts(asked, truth, probs, probs.argmax(axis=1), events, 4))
    assert found["events_caught"] == 1.0
    assert found["lead_hours"] == {
        "p50": 3.0,
        "share_ge_36": None,
        "share_ge_40": None,
        "share_ge_44": None,
    }
    assert found["false_episodes"] == 1  # the last row; the third says nothing
    assert found["pr_auc"] == 0.5
