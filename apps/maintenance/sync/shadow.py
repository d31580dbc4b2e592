"""The shadow: what a new bundle would have said, beside the one in use, on recorded windows.

A rollout is gated on what the plant cares for, hours of warning and false alarms, and not only
on whether an installation succeeds.  Both bundles run as they will on a box, on the same rows.

Legend: N windows, D features, F failures.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.edge.bundle import write_bundle
from apps.maintenance.edge.forecast import Forecaster
from apps.maintenance.protocol import Events, Rows, false_episodes, leads, machine_months
from cluster.errors import ConfigurationError, UnavailableError

_CHUNK = 256  # windows of one request, as an agent sends them
_FIELDS = ("features", "names", "machine", "hour", "failure_machine", "failure_hour", "step_h")


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """Recorded windows and the failures that followed.

    Args:
        features: float32 [N, D], sorted by machine and hour.
        names: Of the columns [D].
        machine: Index of each window's machine, int64 [N].
        hour: Of each window's end, int64 [N].
        failure_machine: int64 [F].
        failure_hour: int64 [F].
        step_h: Hours between the windows of a machine.
    """

    features: NDArray[np.float32]
    names: tuple[str, ...]
    machine: NDArray[np.int64]
    hour: NDArray[np.int64]
    failure_machine: NDArray[np.int64]
    failure_hour: NDArray[np.int64]
    step_h: int

    @classmethod
    def read(cls, path: Path) -> "History":
        """Read a history from an npz file with the fields of this class.

        Raises:
            FileNotFoundError: There is none.
            ConfigurationError: It is not such a file.
        """
        if not path.exists():
            message = f"{path}: expected the recorded windows of a fleet, npz"
            raise FileNotFoundError(message)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in _FIELDS}
            order = np.lexsort((found["hour"], found["machine"]))
            return cls(
                features=found["features"].astype(np.float32)[order],
                names=tuple(str(name) for name in found["names"]),
                machine=found["machine"].astype(np.int64)[order],
                hour=found["hour"].astype(np.int64)[order],
                failure_machine=found["failure_machine"].astype(np.int64),
                failure_hour=found["failure_hour"].astype(np.int64),
                step_h=int(found["step_h"]),
            )
        except (KeyError, IndexError, ValueError) as error:
            message = f"{path.name}: expected {', '.join(_FIELDS)}, got {error!r:.100}"
            raise ConfigurationError(message) from error

    def write(self, path: Path) -> None:
        """Write it as ``read`` reads it."""
        np.savez(
            path,
            features=self.features,
            names=np.array(self.names),
            machine=self.machine,
            hour=self.hour,
            failure_machine=self.failure_machine,
            failure_hour=self.failure_hour,
            step_h=self.step_h,
        )


@dataclass(frozen=True, slots=True)
class ShadowFigures:
    """What a bundle did on a history.

    Args:
        num_failures: That could be caught.
        caught: Share of them with an alarm within the horizon before.
        lead_p50_h: Median hours of warning of those caught; 0 if none was.
        false_per_month: False alarm episodes per machine-month.
        failed: Why it gave no figures; empty if it did.
    """

    num_failures: int
    caught: float
    lead_p50_h: float
    false_per_month: float
    failed: str = ""


@dataclass(frozen=True, slots=True)
class ShadowLimits:
    """What a new bundle may lose.

    Args:
        lead_loss_h: Median hours of warning.
        caught_loss: Share of failures caught.
        false_per_month: False alarms it may have in any case.
        bought: An old bundle with so many times the false alarms of the new one, and more than
            it may have, has bought its warnings with them: an alarm that is nearly always on is
            never late.  It sets no standard; the new one must catch ``least_caught``.
        least_caught: Share of failures then.
    """

    lead_loss_h: float = 1.0
    caught_loss: float = 0.01
    false_per_month: float = 0.05
    bought: float = 2.0
    least_caught: float = 0.5

    def objection(self, new: ShadowFigures, old: ShadowFigures | None) -> str:
        """Return why a new bundle may not be rolled out; empty if it may.

        Args:
            new: Of the bundle to roll out.
            old: Of the one in use; None if there is none yet.
        """
        if new.failed:
            return f"shadow: {new.failed}"
        allowed = max(self.false_per_month, old.false_per_month if old else 0.0)
        if new.false_per_month > allowed:
            came = f"{new.false_per_month:.3f}"
            return f"false alarms: expected {allowed:.3f} per machine-month at most, got {came}"
        return self._objection_beside(new, old) if old is not None and not old.failed else ""

    def _objection_beside(self, new: ShadowFigures, old: ShadowFigures) -> str:
        has_bought = old.false_per_month > max(
            self.false_per_month, self.bought * new.false_per_month
        )
        least = self.least_caught if has_bought else old.caught - self.caught_loss
        if new.caught < least:
            return f"failures caught: expected {least:.3f}, got {new.caught:.3f}"
        if not has_bought and new.lead_p50_h < old.lead_p50_h - self.lead_loss_h:
            return f"lead: expected {old.lead_p50_h:.0f} h as now, got {new.lead_p50_h:.0f} h"
        return ""


def run_shadow(packed: bytes, history: History) -> ShadowFigures:
    """Return what a bundle says of a history."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bundle(folder, packed)
        forecaster = Forecaster(folder)
        missing = set(forecaster.info.features) - set(history.names)
        if missing:
            message = f"history: expected the bundle's features, lacks {', '.join(sorted(missing))}"
            raise ConfigurationError(message)
        columns = [history.names.index(each) for each in forecaster.info.features]
        try:
            alarm = np.concatenate(
                [
                    forecaster.forecast(
                        history.features[first : first + _CHUNK, columns]
                    ).is_alert.any(axis=1)
                    for first in range(0, len(history.hour), _CHUNK)
                ]
            )
        except UnavailableError as error:
            return ShadowFigures(0, 0.0, 0.0, 0.0, failed=str(error))
        return _figures(history, alarm, int(forecaster.info.alerts.horizon_h))


def _figures(history: History, alarm: NDArray[np.bool_], horizon_h: int) -> ShadowFigures:
    rows = Rows(history.machine, history.hour)
    events = Events(history.failure_machine, history.failure_hour)
    lead = leads(rows, alarm, events, horizon_h)
    truth = _is_before_failure(history, horizon_h)
    false = false_episodes(rows, alarm, truth.astype(np.int64))
    caught = lead[lead > 0]
    return ShadowFigures(
        num_failures=int(lead.size),
        caught=float(np.mean(lead > 0)) if lead.size else 0.0,
        lead_p50_h=float(np.median(caught)) if caught.size else 0.0,
        false_per_month=false / max(machine_months(rows, history.step_h), 1e-9),
    )


def _is_before_failure(history: History, horizon_h: int) -> NDArray[np.bool_]:
    """Return for each window whether a failure follows within the horizon, [N]."""
    found = np.zeros(history.hour.size, bool)
    for machine, hour in zip(history.failure_machine, history.failure_hour, strict=True):
        first = hour - horizon_h
        is_near = (history.hour >= first) & (history.hour < hour)
        found |= is_near & (history.machine == machine)
    return found
