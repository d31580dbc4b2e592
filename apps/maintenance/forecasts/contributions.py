"""Why a chance is high: how much of its logit would be gone without an input.

Each sensor, the error codes and the service record are hidden in turn, as if unknown, and the
model is asked again: one request for all alerts of a moment.

Legend: K alerts, I inputs.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from apps.maintenance.degrade import joined
from apps.maintenance.fleet import Floats, Ints
from apps.maintenance.forecasts.asking import Answers, ask
from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.inputs import COLUMNS, EVENT, PATCH, PATCH_HOURS, Series
from cluster.client import Client

ERRORS, SERVICE = "error codes", "service record"
FIRST_VALUE, CODE = 4, 2  # columns of a request row
SMALLEST = 1e-6  # chance


async def explain(
    client: Client,
    series: Series,
    components: Ints,
    answers: Answers,
    horizon_idx: int,
    calibration: Calibration,
) -> Sequence[Mapping[str, float]]:
    """Return the contributions to each alert by input.

    Args:
        client: The one door to the model.
        series: Of the K alerts.
        components: That each alert is for [K].
        answers: To these series.
        horizon_idx: Of the chance that counts.
        calibration: Of the model.

    Raises:
        InvalidRequestError, UnknownModelError, UnavailableError: See ``Client.infer``.
    """
    inputs = [*calibration.sensors, ERRORS, SERVICE]
    hidden = joined([without(series, name, calibration) for name in inputs])
    found = await ask(client, hidden, calibration)
    num = components.size
    which = np.arange(num)
    whole = _logit(answers.chance[which, horizon_idx, components])
    left = found.chance.reshape(len(inputs), num, *found.chance.shape[1:])
    gone = whole - _logit(left[:, which, horizon_idx, components])  # [I, K]
    return [dict(zip(inputs, gone[:, k].tolist(), strict=True)) for k in range(num)]


def without(series: Series, name: str, calibration: Calibration) -> Series:
    """Return the series with one input unknown; one of nothing else has one unknown patch left."""
    context, rows = series.context.copy(), series.rows
    num_errors = len(calibration.errors)
    is_event = rows[:, 0] == EVENT
    if name in calibration.sensors:
        idx = calibration.sensors.index(name)
        context[:, [i for i, c in enumerate(COLUMNS) if _is_mean_of(c, idx)]] = np.nan
        rows = rows.copy()
        num = len(calibration.sensors)
        rows[:, FIRST_VALUE + idx : FIRST_VALUE + PATCH_HOURS * num : num] = np.nan
        return Series(rows, series.offsets, context)
    is_error = is_event & (rows[:, CODE] < num_errors)
    starts, gone = {
        ERRORS: (("error",), is_error),
        SERVICE: (("to_visit", "wear_"), is_event & ~is_error),
    }[name]
    context[:, [i for i, c in enumerate(COLUMNS) if c.startswith(starts)]] = np.nan
    first = series.offsets[:-1]
    bare = first[np.logical_and.reduceat(gone, first)]
    rows, kept = rows.copy(), ~gone
    rows[bare, 0], rows[bare, CODE], rows[bare, CODE + 1 :] = PATCH, 0, np.nan
    kept[bare] = True
    before = np.concatenate([[0], np.cumsum(kept)])
    return Series(rows[kept], before[series.offsets].astype(np.int32), context)


def _is_mean_of(column: str, sensor: int) -> bool:
    return column.startswith("mean_") and column.endswith(f"_{sensor}")


def _logit(chance: Floats) -> Floats:
    kept = np.clip(chance, SMALLEST, 1.0 - SMALLEST)
    found: Floats = np.log(kept / (1.0 - kept))
    return found
