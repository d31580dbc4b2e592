"""The alerts of a plant over restarts: the book on disk, moved on by each moment.

Messages are queued before the book is written.  A crash between the two raises the same alert
again, under the same id, so that whoever receives it keeps it once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from apps.maintenance.alerts import Alert, AlertBook, AlertRule, Outlook, Stage
from apps.maintenance.edge.durable import write_whole
from apps.maintenance.fleet import Fleet
from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.forecasts.contributions import explain
from apps.maintenance.forecasts.moment import Moment
from apps.maintenance.protocol import HORIZONS
from cluster.client import Client
from cluster.errors import ConfigurationError

ALERT_HORIZON = 48  # hours; the chance within them raises alerts
CLEAR_SHARE = 0.6  # of the chance that raises an alert; below it one may end


def rule_of(calibration: Calibration) -> AlertRule:
    """Return the rule whose alerts begin where the calibrated decision does.

    With one component at risk the decision names it from p >= caution * (1 - p) on.
    """
    caution = calibration.caution[ALERT_HORIZON]
    raise_at = caution / (1.0 + caution)
    return AlertRule(ALERT_HORIZON, raise_at, CLEAR_SHARE * raise_at)


async def see_moment(
    book: AlertBook, moment: Moment, calibration: Calibration, client: Client
) -> Sequence[Alert]:
    """Move the book on by a moment; return the alerts that have begun or ended with it.

    Raises:
        InvalidRequestError, UnknownModelError, UnavailableError: The book is as before.
    """
    idx = HORIZONS.index(book.rule.horizon_hours)
    chance = moment.answers.chance[:, idx]
    is_open = {alert.key for alert in book.open}
    asked = [
        (n, c)
        for n, c in np.argwhere(chance >= book.rule.clear_below).tolist()
        if chance[n, c] >= book.rule.raise_at
        or (moment.machines[n], calibration.components[c]) in is_open
    ]
    why: dict[tuple[int, int], Mapping[str, float]] = {}
    if asked:
        rows, components = np.array(asked, np.int64).T
        answers = replace(moment.answers, chance=moment.answers.chance[rows])
        series = moment.series.take(rows)
        found = await explain(client, series, components, answers, idx, calibration)
        why = dict(zip(asked, found, strict=True))
    changed = [
        book.see(
            Outlook(
                machine=machine,
                component=component,
                moment_s=_seconds(moment),
                chance=float(chance[n, c]),
                lead_hours=_lead(moment, n),
                contributions=why.get((n, c), {}),
                model_version=moment.answers.version,
            )
        )
        for n, machine in enumerate(moment.machines)
        for c, component in enumerate(calibration.components)
    ]
    return [alert for alert in changed if alert is not None]


def see_repairs(book: AlertBook, fleet: Fleet, hour: int) -> Sequence[Alert]:
    """End the alerts whose component was replaced since they began, strictly before an hour."""
    ended = []
    start_s = np.datetime64(fleet.start, "s").astype(np.int64)
    for alert in book.open:
        machine, component = alert.key
        if machine not in fleet.machines:
            continue
        hours, kinds = fleet.maintenance.before(hour).of(list(fleet.machines).index(machine))
        own = start_s + 3600 * hours[kinds == list(fleet.components).index(component)]
        later = own[own > alert.raised_s]
        if later.size:
            ended.append(book.repaired(machine, component, float(later[0])))
    return [alert for alert in ended if alert is not None]


def message_of(alert: Alert) -> Mapping[str, object]:
    """Return what is sent of an alert; ``id`` is the same however often it is sent."""
    machine, component = alert.key
    return {
        "id": f"{machine}/{component}/{alert.raised_s:.0f}/{alert.stage}",
        **alert.as_message(),
    }


def save_book(book: AlertBook, path: Path) -> None:
    """Write the book, whole."""
    record = {
        "open": [asdict(alert) for alert in book.open],
        "ended": [[*key, moment_s] for key, moment_s in sorted(book.ended.items())],
    }
    write_whole(path, json.dumps(record, indent=1).encode() + b"\n")


def load_book(rule: AlertRule, path: Path) -> AlertBook:
    """Return the book as it was saved; an empty one if it never was.

    Raises:
        ConfigurationError: The file is damaged.
    """
    if not path.exists():
        return AlertBook(rule)
    try:
        record = json.loads(path.read_bytes())
        alerts = [_alert(each) for each in record["open"]]
        ended = {(machine, component): float(s) for machine, component, s in record["ended"]}
    except (KeyError, TypeError, ValueError) as error:
        message = f"{path.name}: expected the alerts of this plant, got {error!r:.100}"
        raise ConfigurationError(message) from error
    return AlertBook.resumed(rule, alerts, ended)


def _alert(record: Mapping[str, Any]) -> Alert:
    outlook = dict(record["outlook"])
    outlook["lead_hours"] = tuple(outlook["lead_hours"])
    return Alert(**{**record, "stage": Stage(record["stage"]), "outlook": Outlook(**outlook)})


def _seconds(moment: Moment) -> float:
    return float(np.datetime64(moment.time, "s").astype(np.int64))


def _lead(moment: Moment, n: int) -> tuple[float, float, float]:
    low, middle, high = moment.answers.hours[n].tolist()
    return low, middle, high
