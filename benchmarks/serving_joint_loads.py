"""What three applications ask of one joint model at once: a stream, CT windows, a fleet.

Each load has a thread and an event loop of its own, as each application is a process.
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np

from apps.imaging.phantom import make_phantom
from apps.imaging.resample import PatientGrid
from apps.imaging.segmentation import DEADLINE_MS, TASK
from apps.imaging.windows import GRID_MM, WindowPlan
from apps.maintenance.demo import make_fleet, read_calibration
from apps.maintenance.forecasts.moment import forecast_hour
from benchmarks.serving_load import Outcome, fraud_requests, open_loop, renamed
from cluster.client import Client
from cluster.errors import TrimoeError
from cluster.schemas import InferRequest, ServiceClass
from cluster.versions import STABLE

TASKS = ("fraud", "organs", "forecast")
RATE_S, ROWS = 20.0, 5  # stream requests a second, transactions of each
STREAM_DEADLINE_MS = 2000.0
LONGEST_S = 36_000.0  # no run takes longer
WINDOWS_IN_FLIGHT = 2
NUM_HOURS = 168  # of the fleet, its last, over and over
PERIOD_S = 0.4  # from one of them to the next
PAUSE_S = 0.1  # after an error


class Loads:
    """The three loads, and when they end.

    Args:
        checkpoint: Folder of a version that is served, with its calibrations.

    Raises:
        ConfigurationError: The calibration of the forecasts is missing.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._windows = list(window_requests())
        self._calibration = read_calibration(checkpoint)
        self._fleet = make_fleet(self._calibration)
        self._stopping = threading.Event()

    async def ask_each(self, client: Client) -> None:
        """Ask for one of each, with patience, so that what is done only once is done."""
        await client.infer(next(fraud_requests(ROWS, DEADLINE_MS)))
        await client.infer(renamed(self._windows[0]))
        await forecast_hour(client, self._fleet, self._fleet.num_hours - 1, self._calibration)

    @contextmanager
    def running(self, client: Client) -> Iterator["Future[Outcome]"]:
        """Run all while the block does; yield what will have come of the stream."""
        with ThreadPoolExecutor(len(TASKS), thread_name_prefix="load") as pool:
            stream = pool.submit(asyncio.run, self._stream(client))
            others = [
                pool.submit(asyncio.run, load) for load in (self._scan(client), self._watch(client))
            ]
            try:
                yield stream
            finally:
                self._stopping.set()
        for other in others:
            other.result()

    async def _stream(self, client: Client) -> Outcome:
        """Score transactions on schedule."""

        def rate(_: float) -> float:
            return 1 / LONGEST_S if self._stopping.is_set() else RATE_S  # the next one never is due

        requests = fraud_requests(ROWS, STREAM_DEADLINE_MS)
        return await open_loop(client, requests, rate, LONGEST_S)

    async def _scan(self, client: Client) -> None:
        """Keep CT windows in flight."""
        windows = cycle(self._windows)

        async def feed() -> None:
            while not self._stopping.is_set():
                try:
                    await client.infer(renamed(next(windows)))
                except TrimoeError:
                    await asyncio.sleep(PAUSE_S)

        async with asyncio.TaskGroup() as group:
            for _ in range(WINDOWS_IN_FLIGHT):
                group.create_task(feed())

    async def _watch(self, client: Client) -> None:
        """Forecast hour by hour, for the calibration's version and for the stable one in turn.

        The application asks for the former, whatever is stable; the copies have one calibration,
        so the stable version can be read by it too.
        """
        last = self._fleet.num_hours
        hours = cycle(range(last - NUM_HOURS, last))
        calibrations = cycle([self._calibration, replace(self._calibration, version=STABLE)])
        while not self._stopping.is_set():
            with suppress(TrimoeError):
                await forecast_hour(client, self._fleet, next(hours), next(calibrations))
            await asyncio.sleep(PERIOD_S)


def window_requests() -> Iterator[InferRequest]:
    """Yield the windows of a phantom as the imaging application asks for them."""
    stack, _ = make_phantom(0)
    plan = WindowPlan(PatientGrid(stack, GRID_MM).sample())
    for number, corner in enumerate(plan.corners):
        window = plan.cut(corner)
        yield InferRequest(
            request_id=f"phantom/{number}",
            tenant="imaging",
            task=TASK,
            features=window.hu,
            cu_seqlens=np.array([0, window.hu.shape[0]], dtype=np.int32),
            extras={"cell": window.cell, "place": window.place_mm},
            service_class=ServiceClass.BATCH,
            deadline_ms=DEADLINE_MS,
        )
