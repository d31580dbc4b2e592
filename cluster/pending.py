"""Requests under way, so that a retry joins the attempt that still runs.

A request is known by tenant and id; a second one of the same id and content gets the same
answer, and the work is called off only when nobody waits for it any more.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.schemas import InferRequest, InferResponse

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True, eq=False)
class _UnderWay:
    request: InferRequest
    answer: "asyncio.Task[InferResponse]"
    num_waiting: int = 0


class PendingRequests:
    """What is under way, by tenant and id."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[str, str], _UnderWay] = {}

    async def join(
        self, request: InferRequest, start: Callable[[], Awaitable[InferResponse]]
    ) -> InferResponse:
        """Return the answer of the attempt under way, or of one that is started now."""
        key = request.tenant, request.request_id
        entry = self._under_way.get(key)
        if entry is None or not _is_same(entry.request, request):
            entry = _UnderWay(request, asyncio.ensure_future(start()))
            self._under_way[key] = entry
        entry.num_waiting += 1
        try:
            return await asyncio.shield(entry.answer)
        finally:
            entry.num_waiting -= 1
            if entry.num_waiting == 0:
                entry.answer.cancel()
                if self._under_way.get(key) is entry:
                    del self._under_way[key]


def _is_same(one: InferRequest, other: InferRequest) -> bool:
    """Tell whether two requests of one id ask the same."""
    if (one.task, one.model_version) != (other.task, other.model_version):
        return False
    if one.extras.keys() != other.extras.keys():
        return False
    pairs: list[tuple[NDArray[Any], NDArray[Any]]] = [
        (one.features, other.features),
        (one.cu_seqlens, other.cu_seqlens),
        *((one.extras[name], other.extras[name]) for name in one.extras),
    ]
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)
