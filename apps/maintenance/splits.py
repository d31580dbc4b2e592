"""The three inputs on which the Azure sample is judged: rows, times, what may be seen.

    logs        whole fleet, event logs alone, seven months against five
    windows     logs and telemetry where there is telemetry: windows around failures and a
                few others, so a case-control sample, optimistic in precision
    contiguous  20 machines with all telemetry of one quarter, January and February against March

Between training and test lies a day, and a row trains only if its label ends before that.
"""

from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from apps.maintenance.fleet import Bools, Fleet, Ints
from apps.maintenance.protocol import Events, Rows, failure_events, grid_rows

TRAIN_END = datetime(2015, 7, 31, 1)
TEST_START = datetime(2015, 8, 1, 1)
QUARTER_TRAIN_END = datetime(2015, 3, 1, 0)
QUARTER_END = datetime(2015, 4, 1, 5)
QUARTER_MACHINES = 20
WINDOW_HOURS = 6  # that must all be measured up to t
EVENT_WINDOW_HOURS = 48
EVENT_MEASURED_HOURS = 34  # of them, or an event of the windows does not count


@dataclass(frozen=True, slots=True)
class Part:
    """One input and its split.

    Args:
        name: Of the input.
        fleet: What may be seen of it.
        rows: All candidate rows.
        train_end: First hour that no training label reaches.
        test_start: Test rows lie after this hour.
        test_end: First hour after the test.
        case_control: Whether the rows were chosen by their outcome.
    """

    name: str
    fleet: Fleet
    rows: Rows
    train_end: int
    test_start: int
    test_end: int
    case_control: bool = False

    def train(self, horizon: int) -> Bools:
        """Return the mask of training rows."""
        return self.rows.hour < self.train_end - horizon

    def test(self, horizon: int) -> Bools:
        """Return the mask of test rows."""
        hour = self.rows.hour
        return (hour > self.test_start) & (hour < self.test_end - horizon)

    def events(self, horizon: int) -> Events:
        """Return the failures of the test that could be caught."""
        tested = self.rows.take(self.test(horizon))
        events = failure_events(self.fleet.failures, tested, self.test_start + horizon)
        kept = events.hour < self.test_end
        if self.case_control:
            kept &= measured_hours(self.fleet, events) >= EVENT_MEASURED_HOURS
        return Events(events.machine[kept], events.hour[kept])


def _known(fleet: Fleet) -> Bools:
    """Return the hours at which a machine's every sensor was read [M, T]."""
    return np.asarray(np.isfinite(fleet.telemetry).all(axis=2))


def measured_hours(fleet: Fleet, events: Events) -> Ints:
    """Return how many of the hours before each event were measured."""
    known = _known(fleet)
    hours = events.hour[:, None] - 1 - np.arange(EVENT_WINDOW_HOURS)
    inside = hours >= 0
    measured: Ints = (known[events.machine[:, None], np.maximum(hours, 0)] & inside).sum(axis=1)
    return measured


def measured_rows(fleet: Fleet, rows: Rows) -> Rows:
    """Return the rows whose last hours were all measured."""
    known = _known(fleet)
    hours = rows.hour[:, None] - np.arange(WINDOW_HOURS)
    inside = hours >= 0
    seen = known[rows.machine[:, None], np.maximum(hours, 0)] & inside
    return rows.take(seen.all(axis=1))


def parts(fleet: Fleet) -> list[Part]:
    """Return the three inputs."""
    rows = grid_rows(fleet)
    end, start = fleet.hour_of(TRAIN_END), fleet.hour_of(TEST_START)
    blind = replace(fleet, telemetry=np.full_like(fleet.telemetry, np.nan))
    quarter = rows.take(rows.machine < QUARTER_MACHINES)
    last = fleet.hour_of(QUARTER_TRAIN_END)
    return [
        Part("logs", blind, rows, end, start, fleet.num_hours),
        Part("windows", fleet, measured_rows(fleet, rows), end, start, fleet.num_hours, True),
        Part("contiguous", fleet, quarter, last, last, fleet.hour_of(QUARTER_END) + 1),
    ]
