"""The forecasts of a fleet at one hour, by the variant that each machine's inputs allow.

Legend: N machines with a forecast, H horizons, C components.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from apps.maintenance.fleet import Fleet
from apps.maintenance.forecasts.asking import Answers, ask
from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.forecasts.variants import NONE, choose_variants, degrade_each
from apps.maintenance.inputs import NUM_PATCHES, PATCH_HOURS, Series, forecast_inputs
from apps.maintenance.protocol import Rows
from cluster.client import Client

TELEMETRY_HOURS = NUM_PATCHES * PATCH_HOURS  # that a forecast looks back over


@dataclass(frozen=True, slots=True)
class Moment:
    """What is forecast at an hour.

    Args:
        time: Of the forecast, UTC.
        machines: With a forecast [N].
        variants: Of the inputs of each [N].
        silent: Machines of which nothing is known, or for which the model has no finite answer.
        series: That was asked about.
        answers: Of the model [N].
    """

    time: datetime
    machines: Sequence[str]
    variants: Sequence[str]
    silent: Sequence[str]
    series: Series
    answers: Answers


async def forecast_hour(
    client: Client, fleet: Fleet, hour: int, calibration: Calibration
) -> Moment | None:
    """Return the forecasts at an hour of the grid; None if nothing is known of any machine.

    Args:
        client: The one door to the model.
        fleet: With the model's names (``Calibration.align``); later hours are not looked at.
        hour: On its grid.
        calibration: Of the model.

    Raises:
        InvalidRequestError, UnknownModelError, UnavailableError: See ``Client.infer``.
    """
    rows = Rows(np.arange(fleet.num_machines), np.full(fleet.num_machines, hour, np.int64))
    variants = choose_variants(fleet, rows)
    known = np.array([name != NONE for name in variants], bool)
    if not known.any():
        return None
    chosen = [name for name in variants if name != NONE]
    series = degrade_each(forecast_inputs(fleet, rows.take(known), calibration.period), chosen)
    answers = await ask(client, series, calibration)
    is_known = np.flatnonzero(known)
    kept = np.flatnonzero(answers.is_ok)
    spoken = set(is_known[kept].tolist())
    return Moment(
        time=fleet.start + timedelta(hours=hour),
        machines=[fleet.machines[i] for i in is_known[kept]],
        variants=[chosen[k] for k in kept],
        silent=[name for i, name in enumerate(fleet.machines) if i not in spoken],
        series=series.take(kept),
        answers=Answers(
            answers.chance[kept],
            answers.decision[kept],
            answers.hours[kept],
            answers.is_ok[kept],
            answers.version,
        ),
    )
