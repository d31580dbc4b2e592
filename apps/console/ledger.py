"""The downtime ledger as its file says: ``ledger.json`` in the folder of the fleet.

    {"period": {"from": ISO 8601, "to": ISO 8601},
     "policy":   {"planned_hours": n, "unplanned_hours": n},
     "baseline": {"name": text, "planned_hours": n, "unplanned_hours": n},
     "saving": {"share": n, "interval": [low, high], "level": n},
     "cost_model": {name: number or text}}

``share`` is of the baseline's unplanned hours that the policy spares; other keys are let be.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.console.uploads import moment_of
from cluster.errors import ConfigurationError

NAME = "ledger.json"
_HOURS = ("planned_hours", "unplanned_hours")
_SHAPE = "period, policy, baseline, saving and cost_model"


def read_ledger(path: Path) -> Mapping[str, Any] | None:
    """Return what the ledger says, for JSON; None if there is no file.

    Raises:
        ConfigurationError: It is not such a file.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        period, saving = found["period"], found["saving"]
        low, high = saving["interval"]
        return {
            "from": moment_of(period["from"]),
            "to": moment_of(period["to"]),
            "policy": {name: _number(found["policy"][name]) for name in _HOURS},
            "baseline": {
                "name": str(found["baseline"]["name"]),
                **{name: _number(found["baseline"][name]) for name in _HOURS},
            },
            "share": _number(saving["share"]),
            "interval": [_number(low), _number(high)],
            "level": _number(saving["level"]),
            "cost_model": {str(key): str(value) for key, value in found["cost_model"].items()},
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{NAME}: expected {_SHAPE}, got {error!r:.100}; write it anew"
        raise ConfigurationError(message) from error


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        message = f"expected a number, got {value!r:.40}"
        raise ValueError(message)
    return float(value)
