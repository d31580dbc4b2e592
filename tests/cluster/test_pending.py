"""A retry joins the attempt that still runs."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from cluster.pending import PendingRequests
from cluster.schemas import InferRequest, InferResponse, Timings

Make = Callable[..., InferRequest]
ANSWER = InferResponse(
    "r",
    np.zeros((0, 1)),
    np.zeros(1, np.int32),
    np.zeros(0, np.uint8),
    "v",
    Timings(0.0, 0.0),
    np.zeros((1, 1), np.int64),
)


class Counting:
    """Starts attempts that end when told."""

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def start(self) -> InferResponse:
        self.started += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return ANSWER


def test_same_request_twice_is_computed_once(make_request: Make) -> None:
    async def run() -> None:
        pending, attempt = PendingRequests(), Counting()
        tasks = [asyncio.create_task(pending.join(make_request(), attempt.start)) for _ in range(3)]
        await asyncio.sleep(0)
        attempt.go.set()
        assert await asyncio.gather(*tasks) == [ANSWER] * 3
        assert attempt.started == 1
        assert await pending.join(make_request(), attempt.start) is ANSWER  # a new one
        assert attempt.started == 2

    asyncio.run(run())


def test_same_id_of_another_tenant_or_content_is_another_request(make_request: Make) -> None:
    async def run() -> None:
        pending, attempt = PendingRequests(), Counting()
        attempt.go.set()
        requests = [
            make_request(request_id="r"),
            make_request(request_id="r", tenant="other"),
            make_request(request_id="r", seed=5),
        ]
        await asyncio.gather(*(pending.join(each, attempt.start) for each in requests))
        assert attempt.started == 3

    asyncio.run(run())


def test_work_is_called_off_when_nobody_waits_any_more(make_request: Make) -> None:
    async def run() -> None:
        pending, attempt = PendingRequests(), Counting()
        first, second = (
            asyncio.create_task(pending.join(make_request(), attempt.start)) for _ in range(2)
        )
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        assert attempt.cancelled == 0
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await asyncio.sleep(0)
        assert attempt.cancelled == 1

    asyncio.run(run())
