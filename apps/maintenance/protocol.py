"""Labels, splits and metrics of failure forecasts: strict, so that nothing leaks.

A row is a machine at an hour t.  Its label at horizon h looks at the failures in
(t, t + h]: a failure in the row's own hour is never part of it.  Pure numpy; knows no model.

Legend: M machines, T hours, C components, N rows, H horizons.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apps.maintenance.fleet import Bools, Fleet, Floats, Ints, Records

HORIZONS = (4, 24, 48, 72)  # hours
ROW_STEP = 3  # hours between the rows of a machine
LEADS = (36, 40, 44)  # hours
JOIN_HOURS = 6  # alarm rows of a machine at most this far apart are one episode
HOURS_PER_MONTH = 24 * 30.44
NEVER = np.int64(10**9)  # hours to a failure that is not on record


@dataclass(frozen=True, slots=True)
class Rows:
    """Machines at hours, sorted by machine and hour.

    Args:
        machine: Index of the machine [N].
        hour: Hour t on the grid [N].
    """

    machine: Ints
    hour: Ints

    @property
    def size(self) -> int:
        """N."""
        return self.machine.size

    def take(self, kept: Bools) -> "Rows":
        """Return the rows of a mask."""
        return Rows(self.machine[kept], self.hour[kept])


def grid_rows(fleet: Fleet, step: int = ROW_STEP) -> Rows:
    """Return all rows t = step, 2 step, ... of every machine."""
    hours = np.arange(step, fleet.num_hours, step, dtype=np.int64)
    machines = np.arange(fleet.num_machines, dtype=np.int64)
    return Rows(np.repeat(machines, hours.size), np.tile(hours, machines.size))


def hours_to_failure(failures: Records, rows: Rows, num_components: int) -> Ints:
    """Return the hours to each component's next failure strictly after t, [N, C]."""
    hours = np.full((rows.size, num_components), NEVER)
    for machine in np.unique(rows.machine):
        first, last = np.searchsorted(rows.machine, (machine, machine + 1))
        moments, kinds = failures.of(machine)
        for component in range(num_components):
            own = moments[kinds == component]
            position = np.searchsorted(own, rows.hour[first:last], side="right")
            found = position < own.size
            part = hours[first:last, component]
            part[found] = own[position[found]] - rows.hour[first:last][found]
    return hours


def labels(hours_NC: Ints, horizon: int) -> Ints:
    """Return 1 + the component that fails first within (t, t + horizon], else 0, [N]."""
    first = hours_NC.argmin(axis=1)
    return np.where(hours_NC.min(axis=1) <= horizon, first + 1, 0)


def macro_f1(truth: Ints, predicted: Ints, num_classes: int) -> float:
    """Return the mean over classes of F1; a class that neither holds counts as 0."""
    return float(np.mean(class_f1(truth, predicted, num_classes)))


def class_f1(truth: Ints, predicted: Ints, num_classes: int) -> Floats:
    """Return F1 of each class."""
    table = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    confusion = table.reshape(num_classes, num_classes)
    hits = confusion.diagonal()
    f1: Floats = 2 * hits / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1), 1)
    return f1


@dataclass(frozen=True, slots=True)
class Events:
    """Machine-hours with a failure that count in a test.

    Args:
        machine: [K]; hour: [K].
    """

    machine: Ints
    hour: Ints


def failure_events(failures: Records, rows: Rows, after: int) -> Events:
    """Return the distinct machine-hours with a failure later than ``after``, of rows' machines."""
    kept = (failures.hour > after) & np.isin(failures.machine, np.unique(rows.machine))
    pairs = np.unique(np.stack([failures.machine[kept], failures.hour[kept]], axis=1), axis=0)
    return Events(pairs[:, 0], pairs[:, 1])


def leads(rows: Rows, alarm: Bools, events: Events, horizon: int) -> Ints:
    """Return the hours from the earliest alarm row in [event - horizon, event - 1], else 0, [K]."""
    machine, hour = rows.machine[alarm], rows.hour[alarm]
    stride = int(rows.hour.max(initial=0) + events.hour.max(initial=0) + horizon) + 1
    keys = machine * stride + hour  # sorted as the rows are
    earliest = events.machine * stride + np.maximum(events.hour - horizon, 0)
    position = np.searchsorted(keys, earliest)
    found = position < keys.size
    lead = np.zeros(events.hour.size, np.int64)
    gap = events.machine[found] * stride + events.hour[found] - keys[position[found]]
    lead[found] = np.where(gap > 0, gap, 0)
    return lead


def episode_ids(rows: Rows, alarm: Bools, truth: Ints) -> tuple[Ints, Bools]:
    """Return the episode of each alarm row, and which episodes hold a row with a true label."""
    machine, hour, real = rows.machine[alarm], rows.hour[alarm], truth[alarm] > 0
    starts = np.ones(machine.size, bool)
    starts[1:] = (np.diff(machine) != 0) | (np.diff(hour) > JOIN_HOURS)
    episodes = np.cumsum(starts) - 1
    is_real = np.zeros(int(starts.sum()), bool)
    np.logical_or.at(is_real, episodes, real)
    return episodes, is_real


def false_episodes(rows: Rows, alarm: Bools, truth: Ints) -> int:
    """Count the episodes of joined alarm rows none of which has a true label."""
    _, is_real = episode_ids(rows, alarm, truth)
    return int((~is_real).sum())


def machine_months(rows: Rows, step: int = ROW_STEP) -> float:
    """Return the machine-months that the rows stand for."""
    return rows.size * step / HOURS_PER_MONTH


@dataclass(frozen=True, slots=True)
class Forecasts:
    """Probabilities of one horizon with what they are judged by.

    Args:
        rows: Of the test.
        truth: Labels [N].
        probs: Of no failure and of each component [N, 1 + C].
        predicted: The class decided on [N].
        events: That could be caught.
        horizon: Hours.
    """

    rows: Rows
    truth: Ints
    probs: Floats
    predicted: Ints
    events: Events
    horizon: int


def metrics(forecasts: Forecasts) -> dict[str, object]:
    """Return the figures of one horizon; shares of leads above the horizon are None."""
    from sklearn.metrics import (  # noqa: PLC0415 - scikit-learn only in evaluation
        average_precision_score,
    )

    truth, predicted = forecasts.truth, forecasts.predicted
    lead = leads(forecasts.rows, predicted > 0, forecasts.events, forecasts.horizon)
    caught = lead[lead > 0]
    false = false_episodes(forecasts.rows, predicted > 0, truth)
    shares = {
        f"share_ge_{hours}": float(np.mean(lead >= hours)) if hours <= forecasts.horizon else None
        for hours in LEADS
    }
    return {
        "macro_f1": macro_f1(truth, predicted, forecasts.probs.shape[1]),
        "f1": class_f1(truth, predicted, forecasts.probs.shape[1]).round(4).tolist(),
        "pr_auc": float(average_precision_score(truth > 0, 1.0 - forecasts.probs[:, 0])),
        "events": int(lead.size),
        "events_caught": float(np.mean(lead > 0)),
        "lead_hours": {"p50": float(np.median(caught)) if caught.size else None, **shares},
        "false_episodes": false,
        "false_alarms_per_machine_month": false / machine_months(forecasts.rows),
    }


def tune_caution(probs: Floats, truth: Ints, cautions: Sequence[float]) -> float:
    """Return the factor on P(no failure) whose decisions have the best macro F1."""
    num_classes = probs.shape[1]
    scores = [macro_f1(truth, decide(probs, caution), num_classes) for caution in cautions]
    best = np.flatnonzero(np.asarray(scores) >= max(scores) - 1e-9)
    return cautions[int(best[best.size // 2])]


def decide(probs: Floats, caution: float) -> Ints:
    """Return the class of the largest probability, that of no failure times ``caution``."""
    weighted = probs.copy()
    weighted[:, 0] *= caution
    chosen: Ints = weighted.argmax(axis=1)
    return chosen
