"""One case through the shared deployment: grid, windows, answers, and what they say.

Knows: which task is asked and how answers are read.  Does not know: who answers.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from apps.imaging.calibration import Calibration, case_confidence, profile
from apps.imaging.case import Case
from apps.imaging.finding import Findings, Organ
from apps.imaging.reading.source import RejectedError
from apps.imaging.resample import PatientGrid
from apps.imaging.stack import SliceStack
from apps.imaging.windows import BODY_HU, GRID_MM, Canvas, Window, WindowPlan
from cluster.client import Client
from cluster.errors import InvalidRequestError
from cluster.schemas import InferRequest, SequenceStatus, ServiceClass

TASK = "organs"
ORGANS = (
    "Brainstem",
    "SpinalCord",
    "RightParotid",
    "LeftParotid",
    "Esophagus",
    "Larynx",
    "Mandible",
)
Box: TypeAlias = tuple[int, int, int, int, int, int]
DEADLINE_MS = 600_000.0
IN_FLIGHT = 4  # windows of a case that are under way at once


@dataclass
class Stopwatch:
    """Seconds of each stage, by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


async def segment(
    case: Case, client: Client, calibration: Calibration, *, tenant: str = "imaging"
) -> Findings:
    """Return the organs of a case, on the grid of its slices.

    Args:
        case: With a stack.
        client: Reaches a deployment that serves the task ``organs``.
        calibration: Of the model that it serves.
        tenant: Who asks.

    Raises:
        InvalidRequestError: The deployment does not take or does not understand the windows.
        UnavailableError: It did not answer in time.
        RejectedError: All of the case is air.
    """
    if case.stack is None:
        message = f"case {case.case_id}: expected slices, got a quarantined case"
        raise ValueError(message)
    watch = Stopwatch()
    grid = PatientGrid(case.stack, GRID_MM)
    hu = await asyncio.to_thread(grid.sample)
    watch.lap("resample")
    plan = await asyncio.to_thread(WindowPlan, hu)
    if not plan.corners:
        raise RejectedError("BODY_MISSING", f"expected a body, all is air below {BODY_HU:.0f} HU")
    canvas = Canvas(plan, hu.shape, 1 + len(ORGANS))
    version = await _ask_all(case.case_id, plan, canvas, client, tenant)
    labels, sure, share = await asyncio.to_thread(canvas.join)
    watch.lap("infer")
    unusual = calibration.unusual(profile(grid, hu))
    labels, sure, share = await asyncio.to_thread(_spread, grid, (labels, sure, share))
    organs = await asyncio.to_thread(measure, case.stack, labels, sure, calibration)
    found = [organ.confidence for organ in organs if organ.box is not None]
    confidence = case_confidence(found, unusual, case.reasons)
    watch.lap("measure")
    return Findings(
        labels=labels,
        confidence=sure,
        local_share=share,
        organs=organs,
        unusual=unusual,
        confidence_case=confidence,
        is_referred=confidence < calibration.refer_below,
        model_version=version,
        seconds=watch.seconds,
    )


async def _ask_all(
    case_id: str, plan: WindowPlan, canvas: Canvas, client: Client, tenant: str
) -> str:
    """Ask for every window, a few at a time; return the model version that answered."""
    room, versions = asyncio.Semaphore(IN_FLIGHT), set[str]()

    async def ask(number: int, corner: tuple[int, int, int]) -> None:
        async with room:
            window = await asyncio.to_thread(plan.cut, corner)
            response = await client.infer(_request(f"{case_id}/{number}", tenant, window))
            if response.status.any() or response.outputs.dtype != np.uint8:
                message = (
                    f"window {number} of {case_id}: expected {SequenceStatus.OK} and uint8 rows, "
                    f"got {response.status.tolist()} and {response.outputs.dtype}"
                )
                raise InvalidRequestError(message)
            canvas.add(window, response.outputs)  # on the loop: windows overlap
            versions.add(response.model_version)

    try:
        async with asyncio.TaskGroup() as group:
            for number, corner in enumerate(plan.corners):
                group.create_task(ask(number, corner))
    except ExceptionGroup as errors:  # callers tell errors apart by their kind
        raise errors.exceptions[0] from None
    return "+".join(sorted(versions))


def _spread(
    grid: PatientGrid, volumes: tuple[NDArray[np.uint8], ...]
) -> tuple[NDArray[np.uint8], ...]:
    return tuple(grid.spread(volume) for volume in volumes)


def _request(request_id: str, tenant: str, window: Window) -> InferRequest:
    return InferRequest(
        request_id=request_id,
        tenant=tenant,
        task=TASK,
        features=window.hu,
        cu_seqlens=np.array([0, window.hu.shape[0]], dtype=np.int32),
        extras={"cell": window.cell, "place": window.place_mm},
        service_class=ServiceClass.BATCH,
        deadline_ms=DEADLINE_MS,
    )


def measure(
    stack: SliceStack,
    labels: NDArray[np.uint8],
    sure: NDArray[np.uint8],
    calibration: Calibration,
) -> tuple[Organ, ...]:
    """Return volume, density and confidence of every organ, from the slices' own pixels.

    Goes over labelled pixels slice by slice: a stray one far from its organ costs nothing.
    """
    num = 1 + len(ORGANS)
    counts = np.zeros((stack.num_slices, num))
    hu_sum, square_sum, sure_sum = sums = np.zeros((3, num))
    low, high = np.full((num, 3), max(labels.shape)), np.zeros((num, 3), dtype=np.intp)
    for k, plane in enumerate(labels):
        at = np.flatnonzero(plane)
        label, hu = plane.ravel()[at], stack.hu[k].ravel()[at].astype(np.float64)
        counts[k] = np.bincount(label, minlength=num)
        sums += [np.bincount(label, each, num) for each in (hu, hu * hu, sure[k].ravel()[at])]
        for organ in np.flatnonzero(counts[k]):
            j, i = np.divmod(at[label == organ], plane.shape[1])
            low[organ] = np.minimum(low[organ], (k, j.min(), i.min()))
            high[organ] = np.maximum(high[organ], (k + 1, j.max() + 1, i.max() + 1))
    area_mm2 = stack.pixel_mm[0] * stack.pixel_mm[1]
    depth_mm = np.gradient(stack.positions_mm) if stack.num_slices > 1 else np.array([GRID_MM])
    volume_ml = depth_mm @ counts * area_mm2 / 1e3
    found = []
    for label, (name, total) in enumerate(zip(ORGANS, counts.sum(axis=0)[1:], strict=True), 1):
        if total == 0:
            found.append(Organ(name, label, 0.0, np.nan, np.nan, None, 0.0, is_sure=False))
            continue
        mean_hu = float(hu_sum[label] / total)
        mean_sure = float(sure_sum[label] / total) / 255.0
        found.append(
            Organ(
                name=name,
                label=label,
                volume_ml=float(volume_ml[label]),
                mean_hu=mean_hu,
                sd_hu=float(np.sqrt(max(square_sum[label] / total - mean_hu**2, 0.0))),
                box=cast("Box", (*low[label].tolist(), *high[label].tolist())),
                confidence=mean_sure,
                is_sure=mean_sure >= calibration.least_sure[name],
            )
        )
    return tuple(found)
