"""Alerts: when one begins, goes on and ends, who has seen it, and how it is said.

An alert begins when the chance of a failure within the horizon reaches the upper threshold,
and ends only when it has stayed below the lower one for some hours (hysteresis).  Ended alerts
of a component stay silent for a cool-down.  Acknowledged ones go on without being said again.
Policy only: no clock, no network; time comes in with each forecast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Self

HOUR_S = 3600.0


class Stage(StrEnum):
    """Where an alert stands."""

    RAISED = "raised"
    ACKNOWLEDGED = "acknowledged"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class AlertRule:
    """When alerts begin and end.

    Args:
        horizon_hours: Of the chance that counts.
        raise_at: Chance from which an alert begins.
        clear_below: Chance below which it may end; at most ``raise_at``.
        clear_hours: For so long the chance must stay below.
        cool_down_hours: After an end; no new alert of the component before.
    """

    horizon_hours: int = 48
    raise_at: float = 0.5
    clear_below: float = 0.3
    clear_hours: float = 6.0
    cool_down_hours: float = 12.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.clear_below <= self.raise_at <= 1.0:
            message = (
                "expected 0 <= clear_below <= raise_at <= 1, "
                f"got clear_below {self.clear_below} and raise_at {self.raise_at}"
            )
            raise ValueError(message)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a forecast says of one component.

    Args:
        machine: Its machine.
        component: Its name.
        moment_s: Of the forecast, seconds since 1970.
        chance: Of a failure within the rule's horizon.
        lead_hours: Low end, median and high end of the hours left; the last may be infinite.
        contributions: By sensor or log: how much of the chance's logit would be gone without it.
        model_version: Of the model.
    """

    machine: str
    component: str
    moment_s: float
    chance: float
    lead_hours: tuple[float, float, float]
    contributions: Mapping[str, float]
    model_version: str


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert through its life.

    Args:
        stage: Where it stands.
        raised_s: When it began.
        outlook: The latest forecast above the lower threshold.
        below_since_s: Since when the chance is below the lower threshold; None if it is not.
        acknowledged_by: Who has seen it.
        ended_s: When it ended.
    """

    stage: Stage
    raised_s: float
    outlook: Outlook
    below_since_s: float | None = None
    acknowledged_by: str = ""
    ended_s: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Machine and component."""
        return self.outlook.machine, self.outlook.component

    def as_message(self) -> dict[str, object]:
        """Return what is sent out, for JSON; an open end of the interval is null."""
        low, middle, high = self.outlook.lead_hours
        ranked = sorted(self.outlook.contributions.items(), key=lambda item: -item[1])
        return {
            "stage": str(self.stage),
            "machine": self.outlook.machine,
            "component": self.outlook.component,
            "chance": round(self.outlook.chance, 4),
            "lead_hours": round(middle, 1),
            "interval_hours": [round(low, 1), None if high == float("inf") else round(high, 1)],
            "contributions": {name: round(value, 3) for name, value in ranked},
            "raised": self.raised_s,
            "time": self.outlook.moment_s,
            "ended": self.ended_s,
            "acknowledged_by": self.acknowledged_by,
            "model_version": self.outlook.model_version,
        }


@dataclass(slots=True)
class AlertBook:
    """All alerts of a fleet, moved on by forecasts and people.

    Args:
        rule: When alerts begin and end.
    """

    rule: AlertRule
    _open: dict[tuple[str, str], Alert] = field(default_factory=dict)
    _ended: dict[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def resumed(
        cls, rule: AlertRule, alerts: Sequence[Alert], ended: Mapping[tuple[str, str], float]
    ) -> Self:
        """Return a book that goes on where another one was.

        Args:
            rule: When alerts begin and end.
            alerts: That were open.
            ended: When the last alert of a machine and component ended.
        """
        return cls(rule, {alert.key: alert for alert in alerts}, dict(ended))

    @property
    def ended(self) -> Mapping[tuple[str, str], float]:
        """When the last alert of each machine and component ended, seconds since 1970."""
        return self._ended

    @property
    def open(self) -> Sequence[Alert]:
        """Alerts that have not ended, oldest first."""
        return sorted(self._open.values(), key=lambda alert: alert.raised_s)

    def see(self, outlook: Outlook) -> Alert | None:
        """Take in a forecast; return the alert if it has just begun or ended."""
        key = (outlook.machine, outlook.component)
        alert = self._open.get(key)
        if alert is None:
            return self._begin(key, outlook)
        if outlook.chance >= self.rule.clear_below:
            self._open[key] = replace(alert, outlook=outlook, below_since_s=None)
            return None
        since = outlook.moment_s if alert.below_since_s is None else alert.below_since_s
        if outlook.moment_s - since < self.rule.clear_hours * HOUR_S:
            self._open[key] = replace(alert, below_since_s=since)
            return None
        del self._open[key]
        self._ended[key] = outlook.moment_s
        return replace(alert, stage=Stage.CLEARED, ended_s=outlook.moment_s)

    def _begin(self, key: tuple[str, str], outlook: Outlook) -> Alert | None:
        quiet_until = self._ended.get(key, -float("inf")) + self.rule.cool_down_hours * HOUR_S
        if outlook.chance < self.rule.raise_at or outlook.moment_s < quiet_until:
            return None
        self._open[key] = Alert(Stage.RAISED, outlook.moment_s, outlook)
        return self._open[key]

    def acknowledge(self, machine: str, component: str, who: str) -> Alert:
        """Note that somebody has seen an alert.

        Raises:
            KeyError: There is no such open alert.
        """
        alert = self._open.get((machine, component))
        if alert is None:
            message = f"expected an open alert of {component} on {machine}, found none"
            raise KeyError(message)
        seen = replace(alert, stage=Stage.ACKNOWLEDGED, acknowledged_by=who)
        self._open[machine, component] = seen
        return seen

    def repaired(self, machine: str, component: str, moment_s: float) -> Alert | None:
        """End an alert because its component was replaced; without a cool-down."""
        alert = self._open.pop((machine, component), None)
        return alert and replace(alert, stage=Stage.CLEARED, ended_s=moment_s)
