"""What a plant measures and writes down: names, units and the sampling period, in ``plant.json``.

    {"period_s": 60, "sensors": {"vibration": "mm/s", "current": "A"},
     "errors": ["E1", "E2"], "components": ["bearing", "drive"]}

A message that contradicts it is set aside: a value in another unit is no value.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from apps.maintenance.edge.durable import write_whole
from cluster.errors import ConfigurationError

FILE = "plant.json"
HOUR_S = 3600
LEAST_SHARE = 0.5  # of an hour's samples


@dataclass(frozen=True, slots=True)
class Plant:
    """The names and rates of one plant.

    Args:
        period_s: Seconds between two samples of a sensor; divides an hour.
        sensors: Unit by name.
        errors: Codes of the event log.
        components: What fails and is replaced.

    Raises:
        ConfigurationError: There is no sensor, or the period does not divide an hour.
    """

    period_s: int
    sensors: Mapping[str, str]
    errors: tuple[str, ...]
    components: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.period_s <= HOUR_S or HOUR_S % self.period_s:
            message = f"period_s: expected whole seconds that divide an hour, got {self.period_s}"
            raise ConfigurationError(message)
        if not self.sensors or not self.components:
            message = "expected one sensor and one component or more, got none"
            raise ConfigurationError(message)

    @property
    def samples_per_hour(self) -> int:
        """Of a sensor without gaps."""
        return HOUR_S // self.period_s

    @property
    def least_samples(self) -> int:
        """With fewer of a sensor an hour is missing."""
        return max(1, math.ceil(LEAST_SHARE * self.samples_per_hour))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            FileNotFoundError: There is none.
            ConfigurationError: It is not a plant's.
        """
        try:
            record = json.loads(path.read_bytes())
            return cls(
                period_s=int(record["period_s"]),
                sensors={str(name): str(unit) for name, unit in record["sensors"].items()},
                errors=tuple(map(str, record["errors"])),
                components=tuple(map(str, record["components"])),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            message = f"{path.name}: expected period_s, sensors, errors and components of a plant"
            raise ConfigurationError(f"{message}, got {error!r:.80}") from error

    def write(self, path: Path) -> None:
        """Write the file."""
        write_whole(path, json.dumps(asdict(self), indent=1).encode() + b"\n")
