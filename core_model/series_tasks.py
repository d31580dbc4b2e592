"""The tasks on telemetry and event logs, as entry points of ``trimoe.tasks``.

A sequence is one machine at one moment.  Its rows are patches of telemetry and events of
the log; what summarises the machine (wear, age, rolling statistics) is its context.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core_model.tasks import ExtraSpec, TaskSpec

if TYPE_CHECKING:
    from torch import nn

    from core_model.config import MoEConfig

COLUMN_KIND = 0  # 0 a patch of telemetry, 1 an event
COLUMN_AGE = 1  # hours or cycles from the row's last moment to now
COLUMN_CODE = 2  # which event; 0 for patches
COLUMN_AHEAD = 3  # hours from the event to the visit that is due next, NaN if none is
ROW_COLUMNS = ("kind", "age", "code", "ahead")
FIRST_VALUE = len(ROW_COLUMNS)
EXTRA_TOKENS = 3  # state alone; state and tree side by side

HORIZONS = (4, 24, 48, 72)  # hours; the hazard buckets end here
NUM_COMPONENTS = 4
NUM_ERRORS = 5
NUM_SENSORS = 4
NUM_HAZARDS = len(HORIZONS) * NUM_COMPONENTS
QUANTILES = (0.05, 0.5, 0.95)
NUM_RUL_CHANNELS = 21


class SeriesShape(NamedTuple):
    """Widths of a task on series.

    Args:
        channels: Sensors.
        patch: Moments of a patch row.
        codes: Sorts of events.
        context: Context columns.
        tree: Answers of the tree expert.
    """

    channels: int
    patch: int
    codes: int
    context: int
    tree: int

    @property
    def row_columns(self) -> tuple[str, ...]:
        """Names of a row's columns; values by moment, then sensor, oldest first."""
        values = [f"value_{p}_{c}" for p in range(self.patch) for c in range(self.channels)]
        return (*ROW_COLUMNS, *values)


SUMMARY_HOURS = (3, 6, 12, 24, 48)
ERROR_HOURS = (12, 24, 48)
FORECAST_CONTEXT = (  # see apps/maintenance/features.py
    "to_visit_h",
    *(f"wear_{i}" for i in range(NUM_COMPONENTS)),
    "age_years",
    *(f"model_{i}" for i in range(4)),
    *(f"errors_{h}h_{i}" for h in ERROR_HOURS for i in range(NUM_ERRORS)),
    *(f"error_ahead_{i}" for i in range(NUM_ERRORS)),
    *(f"error_age_{i}" for i in range(NUM_ERRORS)),
    *(f"mean_{h}h_{i}" for h in SUMMARY_HOURS for i in range(NUM_SENSORS)),
    *(f"mean_ahead_{i}" for i in range(NUM_SENSORS)),
    "moments_ahead",
)
FORECAST_SHAPE = SeriesShape(
    channels=NUM_SENSORS,
    patch=6,
    codes=NUM_ERRORS + NUM_COMPONENTS,
    context=len(FORECAST_CONTEXT),
    tree=NUM_HAZARDS,
)
RUL_SUMMARIES = (
    "level",
    "mean_10",
    "mean_30",
    "sd_10",
    "sd_30",
    "trend",
    "drift",
    "slope",
    "change",
)
NUM_COURSE = 12  # columns on the course of the health index, see apps/maintenance/wear.py
RUL_CAP = 125  # cycles; "early life" is the life left up to it
RUL_CONTEXT = (
    "cycle",
    *(f"{name}_{i}" for name in RUL_SUMMARIES for i in range(NUM_RUL_CHANNELS)),
    *(f"course_{i}" for i in range(NUM_COURSE)),
)
RUL_LIVES = ("early_life", "life")  # up to the cap, and as it is
RUL_SHAPE = SeriesShape(
    channels=NUM_RUL_CHANNELS,
    patch=5,
    codes=1,
    context=len(RUL_CONTEXT),
    tree=len(RUL_LIVES),
)


def _count_tokens(num_rows: NDArray[np.int32]) -> NDArray[np.int64]:
    return num_rows.astype(np.int64) + EXTRA_TOKENS


def _build_forecast_adapter(config: "MoEConfig") -> "nn.Module":
    from core_model.hazard import HazardAdapter  # noqa: PLC0415 - torch stays out of here

    return HazardAdapter(config)


def _build_rul_adapter(config: "MoEConfig") -> "nn.Module":
    from core_model.series import SeriesAdapter  # noqa: PLC0415 - likewise

    return SeriesAdapter(config, RUL_SHAPE)


def _build_forecast_head(config: "MoEConfig") -> "nn.Module":
    from core_model.hazard import HazardHead  # noqa: PLC0415 - likewise

    return HazardHead(config)


def _build_rul_head(config: "MoEConfig") -> "nn.Module":
    from core_model.hazard import LifeHead  # noqa: PLC0415 - likewise

    return LifeHead(config)


FORECAST = TaskSpec(
    name="forecast",
    d_task=len(FORECAST_SHAPE.row_columns),
    outputs=(
        *(f"prob_{h}h_{c}" for h in HORIZONS for c in range(NUM_COMPONENTS)),
        *(f"log_hours_{round(100 * q)}" for q in QUANTILES),
        *(f"hazard_{i}" for i in range(NUM_HAZARDS)),
        *(f"sequence_hazard_{i}" for i in range(NUM_HAZARDS)),
    ),
    build_adapter=_build_forecast_adapter,
    build_head=_build_forecast_head,
    count_tokens=_count_tokens,
    max_rows=64,
    max_tokens=64 + EXTRA_TOKENS,
    service_class="interactive",
    deadline_ms=2000.0,
    extras={"context": ExtraSpec(width=FORECAST_SHAPE.context, columns=FORECAST_CONTEXT)},
    columns=FORECAST_SHAPE.row_columns,
)
RUL = TaskSpec(
    name="rul",
    d_task=len(RUL_SHAPE.row_columns),
    outputs=(
        *RUL_LIVES,
        *(f"{expert}_{name}" for expert in ("tree", "sequence") for name in RUL_LIVES),
        *(f"early_life_{round(100 * q)}" for q in QUANTILES),
    ),
    build_adapter=_build_rul_adapter,
    build_head=_build_rul_head,
    count_tokens=_count_tokens,
    max_rows=64,
    max_tokens=64 + EXTRA_TOKENS,
    service_class="interactive",
    deadline_ms=2000.0,
    extras={"context": ExtraSpec(width=RUL_SHAPE.context, columns=RUL_CONTEXT)},
    columns=RUL_SHAPE.row_columns,
)
