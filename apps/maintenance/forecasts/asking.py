"""One request for all machines of a moment, and its answer in the terms of a plant.

Legend: N rows, H horizons, C components.
"""

import uuid
from dataclasses import dataclass

import numpy as np

from apps.maintenance.chances import first_failure, hazard_probs
from apps.maintenance.fleet import Bools, Floats, Ints
from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.inputs import Series
from apps.maintenance.intervals import bounds
from apps.maintenance.protocol import HORIZONS, decide
from cluster.client import Client
from cluster.errors import UnavailableError
from cluster.schemas import InferRequest, SequenceStatus, ServiceClass

TASK, TENANT = "forecast", "maintenance"
DEADLINE_MS = 20_000.0  # a fleet on two cores; a forecast an hour is not in a hurry
NUM_QUANTILES = 3


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model says of rows.

    Args:
        chance: Of a failure of each component within each horizon [N, H, C].
        decision: 0, or 1 + the component that the calibrated decision names [N, H].
        hours: Low end, median, high end of the hours left; the last may be infinite [N, 3].
        is_ok: Whether the model gave a finite answer [N].
        version: Of the model.
    """

    chance: Floats
    decision: Ints
    hours: Floats
    is_ok: Bools
    version: str


async def ask(client: Client, series: Series, calibration: Calibration) -> Answers:
    """Ask the shared deployment for the version that the calibration belongs to.

    Raises:
        InvalidRequestError, UnknownModelError, UnavailableError: See ``Client.infer``.
    """
    request = InferRequest(
        request_id=uuid.uuid4().hex,
        tenant=TENANT,
        task=TASK,
        features=series.rows,
        cu_seqlens=series.offsets,
        extras={"context": series.context},
        service_class=ServiceClass.INTERACTIVE,
        deadline_ms=DEADLINE_MS,
        model_version=calibration.version,
    )
    response = await client.infer(request)
    num_hazards = len(HORIZONS) * len(calibration.components)
    outputs = np.asarray(response.outputs, np.float64)
    width = 3 * num_hazards + NUM_QUANTILES
    if outputs.shape != (series.context.shape[0], width):
        message = f"{TASK}: expected {width} outputs a machine, got shape {outputs.shape}"
        raise UnavailableError(message)
    shape = (-1, len(HORIZONS), len(calibration.components))
    first = num_hazards + NUM_QUANTILES
    classes = first_failure(hazard_probs(outputs[:, first : first + num_hazards].reshape(shape)))
    decisions = [decide(classes[:, i], calibration.caution[h]) for i, h in enumerate(HORIZONS)]
    return Answers(
        chance=outputs[:, :num_hazards].reshape(shape),
        decision=np.stack(decisions, axis=1),
        hours=_hours(outputs[:, num_hazards:first], calibration),
        is_ok=np.asarray(response.status == SequenceStatus.OK),
        version=response.model_version,
    )


def _hours(log_hours: Floats, calibration: Calibration) -> Floats:
    """Return low end, median and high end in hours [N, 3]."""
    low, high = bounds(log_hours, calibration.margin, float(np.log1p(calibration.cap_hours)))
    low = np.minimum(low, high)  # a margin below 0 may cross the ends of a narrow interval
    middle = np.clip(log_hours[:, 1], low, high)
    found: Floats = np.maximum(np.expm1(np.stack([low, middle, high], axis=1)), 0.0)
    return found
