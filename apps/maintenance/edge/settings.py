"""What a box is told once: ``agent.json`` in its state folder, and the root of trust beside it."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from apps.maintenance.edge.durable import write_whole
from apps.maintenance.edge.outbox import MIN_CAP_BYTES
from apps.maintenance.edge.watch import HealthLimits
from cluster.errors import ConfigurationError

CONFIG, ROOT = "agent.json", "root.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a box.

    Args:
        agent: Its name in the fleet.
        group: Its fleet group.
        cloud: Root URL of the sync server; empty for a box that is only fed by stick.
        pin: The only model version it may run; 0 if any.
        sync_s: Seconds between two talks with the platform.
        cap_bytes: Disk for messages that wait.
        health_port: Of the health endpoint on the loopback address; 0 takes a free one.
        limits: What a new model may do while it is watched.

    Raises:
        ConfigurationError: A value cannot be used; says which.
    """

    agent: str
    group: str
    cloud: str = ""
    pin: int = 0
    sync_s: float = 60.0
    cap_bytes: int = 64 * 2**20
    health_port: int = 8099
    limits: HealthLimits = field(default_factory=HealthLimits)

    def __post_init__(self) -> None:
        for name in ("agent", "group"):
            value = getattr(self, name)
            if not _NAME.fullmatch(value):
                message = f"{name}: expected up to 64 letters, digits, '.', '_', '-', got {value!r}"
                raise ConfigurationError(message)
        if self.cap_bytes < MIN_CAP_BYTES or self.sync_s <= 0 or self.pin < 0:
            message = (
                f"expected cap_bytes of {MIN_CAP_BYTES} or more, sync_s above 0 and pin of 0 or "
                f"more, got {self.cap_bytes}, {self.sync_s}, {self.pin}"
            )
            raise ConfigurationError(message)

    @classmethod
    def read(cls, state: Path) -> Self:
        """Return the settings in a state folder.

        Raises:
            FileNotFoundError: The box was not set up.
            ConfigurationError: The file is damaged.
        """
        path = state / CONFIG
        if not path.exists():
            message = f"{state}: expected a box that was set up; run trimoe edge init"
            raise FileNotFoundError(message)
        try:
            record = json.loads(path.read_bytes())
            return cls(**{**record, "limits": HealthLimits(**record["limits"])})
        except (KeyError, TypeError, ValueError) as error:
            message = f"{CONFIG}: expected the settings of a box, got {error!r:.120}"
            raise ConfigurationError(message) from error

    def write(self, state: Path) -> None:
        """Write the settings into a state folder."""
        write_whole(state / CONFIG, json.dumps(asdict(self), indent=1).encode() + b"\n")
