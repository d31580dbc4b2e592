"""What the training chose on held-out rows, read from the folder of the weights.

``forecast.json`` beside ``manifest.json``, as ``training/train.py`` writes it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from apps.maintenance.degrade import VARIANTS
from apps.maintenance.fleet import Fleet, Floats32, Ints, Records
from apps.maintenance.protocol import HORIZONS
from cluster.errors import ConfigurationError

FILE, MANIFEST = "forecast.json", "manifest.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a model version is to be read.

    Args:
        version: Of the model it belongs to.
        caution: Factor on the probability of no failure at each horizon.
        margin: Added on both sides of the interval of log(1 + hours left).
        cap_hours: Hours left beyond which the model says "more than".
        period: Of the visits in hours, 0 for none.
        components: Names by index; errors, sensors: likewise.
        accuracy: Held-out figures by variant and horizon; a variant nobody measured is absent.
    """

    version: str
    caution: Mapping[int, float]
    margin: float
    cap_hours: float
    period: int
    components: tuple[str, ...]
    errors: tuple[str, ...]
    sensors: tuple[str, ...]
    accuracy: Mapping[str, Mapping[str, Mapping[str, Any]]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it.

        Raises:
            FileNotFoundError: The folder has none.
            ConfigurationError: It is not such a file.
        """
        try:
            record = json.loads((folder / FILE).read_bytes())
            degraded = record.get("degraded", {})
            accuracy = {name: degraded[name]["horizons"] for name in VARIANTS if name in degraded}
            return cls(
                version=str(json.loads((folder / MANIFEST).read_bytes())["version"]),
                caution={h: float(record["caution"][str(h)]) for h in HORIZONS},
                margin=float(record["interval_margin"]),
                cap_hours=float(record["life_cap_hours"]),
                period=int(record["service_period_hours"]),
                components=tuple(map(str, record["components"])),
                errors=tuple(map(str, record["errors"])),
                sensors=tuple(map(str, record["sensors"])),
                accuracy={"both": record["held_out"], **accuracy},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            message = f"{FILE}: expected what trimoe maintenance train writes, got {error!r:.100}"
            raise ConfigurationError(message) from error

    def known_accuracy(self, variant: str, horizon: int) -> Mapping[str, float] | None:
        """Return macro F1 and false alarms per machine-month of a variant; None if not measured."""
        found = self.accuracy.get(variant, {}).get(str(horizon))
        names = ("macro_f1", "false_alarms_per_machine_month")
        return None if found is None else {name: float(found[name]) for name in names}

    def align(self, fleet: Fleet) -> Fleet:
        """Return a fleet with the model's names in the model's order.

        Raises:
            ConfigurationError: The fleet has a name that the model does not know.
        """
        errors = _places("errors", fleet.error_names, self.errors)
        components = _places("components", fleet.components, self.components)
        sensors = _places("sensors", fleet.sensors, self.sensors)
        shape = (*fleet.telemetry.shape[:2], len(self.sensors))
        telemetry: Floats32 = np.full(shape, np.nan, np.float32)
        telemetry[:, :, sensors] = fleet.telemetry
        return replace(
            fleet,
            error_names=self.errors,
            components=self.components,
            sensors=self.sensors,
            errors=_renamed(fleet.errors, errors),
            failures=_renamed(fleet.failures, components),
            maintenance=_renamed(fleet.maintenance, components),
            telemetry=telemetry,
        )


def _places(what: str, names: Sequence[str], known: Sequence[str]) -> Ints:
    unknown = sorted(set(names) - set(known))
    if unknown:
        message = f"{what}: expected those of the model, {', '.join(known)}, got {unknown[0]!r}"
        raise ConfigurationError(message)
    return np.array([known.index(name) for name in names], np.int64)


def _renamed(records: Records, places: Ints) -> Records:
    if records.kind.size == 0:
        return records
    return Records.sorted(records.machine, records.hour, places[records.kind])
