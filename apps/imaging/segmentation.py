"""One case through the shared deployment: grid, windows, answers, and what they say.

Knows: which task is asked and how answers are read.  Does not know: who answers.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from apps.imaging.calibration import Calibration, case_confidence, profile
from apps.imaging.case import Case
from apps.imaging.finding import Findings, Organ
from apps.imaging.resample import PatientGrid
from apps.imaging.stack import SliceStack
from apps.imaging.windows import GRID_MM, Canvas, Window, WindowPlan
from cluster.client import Client
from cluster.errors import InvalidRequestError, TrimoeError
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
    """
    if case.stack is None:
        message = f"case {case.case_id}: expected slices, got a quarantined case"
        raise ValueError(message)
    watch = Stopwatch()
    grid = PatientGrid(case.stack, GRID_MM)
    hu = await asyncio.to_thread(grid.sample)
    watch.lap("resample")
    plan = await asyncio.to_thread(WindowPlan, hu)
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
    except* TrimoeError as group_error:
        raise group_error.exceptions[0] from None
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
    """Return volume, density and confidence of every organ, from the slices' own pixels."""
    area_mm2 = stack.pixel_mm[0] * stack.pixel_mm[1]
    depth_mm = np.gradient(stack.positions_mm) if stack.num_slices > 1 else np.array([GRID_MM])
    boxes = label_boxes(labels, len(ORGANS))
    found = []
    for label, (name, box) in enumerate(zip(ORGANS, boxes, strict=True), start=1):
        if box is None:
            found.append(Organ(name, label, 0.0, np.nan, np.nan, None, 0.0, is_sure=False))
            continue
        at = tuple(slice(low, high) for low, high in zip(box[:3], box[3:], strict=True))
        inside = labels[at] == label
        hu = stack.hu[at][inside].astype(np.float64)
        volume_mm3 = float(inside.sum(axis=(1, 2)) @ depth_mm[at[0]]) * area_mm2
        mean_sure = float(sure[at][inside].mean()) / 255.0
        is_sure = mean_sure >= calibration.least_sure[name]
        found.append(
            Organ(
                name,
                label,
                volume_mm3 / 1e3,
                float(hu.mean()),
                float(hu.std()),
                box,
                mean_sure,
                is_sure=is_sure,
            )
        )
    return tuple(found)


def label_boxes(
    labels: NDArray[np.uint8], num: int
) -> Sequence[tuple[int, int, int, int, int, int] | None]:
    """Return the box of each label from 1 to ``num``: its first voxel and the one behind its last."""
    from scipy import ndimage  # noqa: PLC0415 - half a second of import

    found: Sequence[tuple[slice, ...] | None] = ndimage.find_objects(labels, max_label=num)
    boxes: list[tuple[int, int, int, int, int, int] | None] = []
    for at in found:
        if at is None:
            boxes.append(None)
        else:
            k, j, i = at
            boxes.append((k.start, j.start, i.start, k.stop, j.stop, i.stop))
    return boxes
