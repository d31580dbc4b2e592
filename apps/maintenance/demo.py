"""The forecasts of ``trimoe demo --all``: a generated fleet, asked about hour by hour."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.maintenance.fleet import Fleet
from apps.maintenance.forecasts.calibration import FILE, Calibration
from apps.maintenance.forecasts.moment import forecast_hour
from apps.maintenance.simulate import SimulationConfig, simulate
from cluster.client import Client
from cluster.errors import ConfigurationError

NUM_MACHINES = 15
NUM_DAYS = 21  # by its last week every machine has had a visit, so something is known of each


def make_fleet(calibration: Calibration) -> Fleet:
    """Return a generated fleet with the names of a model.

    Raises:
        ConfigurationError: The model belongs to another kind of fleet.
    """
    return calibration.align(simulate(SimulationConfig(NUM_MACHINES, NUM_DAYS)))


def read_calibration(model: Path) -> Calibration:
    """Return the calibration beside the weights in a folder.

    Raises:
        ConfigurationError: There is none, or it is not such a file.
    """
    try:
        return Calibration.read(model)
    except FileNotFoundError as error:
        message = f"{model.name}: expected {FILE} beside the weights, got none"
        raise ConfigurationError(message) from error


@dataclass(frozen=True, slots=True)
class Round:
    """What is asked.

    Args:
        fleet: Of ``make_fleet``.
        num_hours: So many of its last hours, one after another.
        period_s: From one to the next; an answer may take longer.
    """

    fleet: Fleet
    num_hours: int
    period_s: float


async def ask_hours(
    client: Client,
    plan: Round,
    calibration: Calibration,
    stopping: threading.Event,
    show: Callable[[int], object],
) -> Sequence[float]:
    """Forecast hours of a fleet.

    Args:
        client: The one door to the model.
        plan: What is asked.
        calibration: Of the model.
        stopping: Set to end early.
        show: Takes the number of forecasts that came back so far.

    Returns:
        Of each forecast of a machine that came back, the milliseconds until it did.

    Raises:
        InvalidRequestError, UnknownModelError, UnavailableError: See ``Client.infer``.
    """
    taken_ms: list[float] = []
    for hour in range(plan.fleet.num_hours - plan.num_hours, plan.fleet.num_hours):
        began_s = time.perf_counter()
        moment = await forecast_hour(client, plan.fleet, hour, calibration)
        took_s = time.perf_counter() - began_s
        taken_ms += [took_s * 1e3] * len(moment.machines if moment else ())
        show(len(taken_ms))
        if stopping.is_set():
            break
        await asyncio.sleep(max(plan.period_s - took_s, 0.0))
    return taken_ms
