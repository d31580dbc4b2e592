"""The client over a Ray Serve handle: object store for large requests, retries, our errors."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.errors import (
    DeadlineExceededError,
    QueueFullError,
    ReplicaLostError,
    TrimoeError,
    UnavailableError,
)
from cluster.retry import RecentRefusals, RetryPolicy
from cluster.schemas import InferRequest, InferResponse

APP_NAME: Final = "trimoe"
CORE_NAME: Final = "InferenceCore"
RETRY: Final = RetryPolicy(silent_share=0.5)  # then there is as much time for another replica
OBJECT_STORE_BYTES = 2**20  # larger requests go by reference (design.md section 2)
STATUS_TIMEOUT_S = 5.0


class HandleClient:
    """Reaches the ``InferenceCore`` deployment from inside the Ray cluster.

    Args:
        handle: Handle of the deployment.
        retry: Pauses between attempts.
    """

    def __init__(self, handle: DeploymentHandle[Any], retry: RetryPolicy | None = None) -> None:
        self._handle = handle
        self._retry = retry or RETRY
        self._refusals = RecentRefusals()

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``cluster.client.Client``)."""
        return await self._retry.send(request, self._attempt)

    async def status(self) -> Mapping[str, Any]:
        """Return what a replica reports of itself (see ``fetch_status``)."""
        return await fetch_status(self._handle)

    async def _attempt(self, request: InferRequest) -> InferResponse:
        self._refusals.check(request)
        try:
            if _num_bytes(request) > OBJECT_STORE_BYTES:
                by_reference = self._handle.options(_by_reference=True)
                response = await by_reference.infer.remote(ray.put(request))
            else:
                response = await self._handle.infer.remote(request)
        except RayTaskError as error:
            raise translate(error) from None
        except (RayError, RayServeException) as error:
            raise translate(error) from error
        if isinstance(response, DeadlineExceededError):
            self._refusals.note(request, response)
        if isinstance(response, TrimoeError):
            raise response
        if not isinstance(response, InferResponse):
            message = f"replica: expected an InferResponse, got {type(response).__name__}"
            raise UnavailableError(message)
        return response


def connect() -> HandleClient:
    """Return a client of the running application, for the running event loop of a Ray process.

    Its router starts here: by default it does with the first request, which then blocks the
    event loop for as long as the head is away.
    """
    handle = serve.get_deployment_handle(CORE_NAME, APP_NAME)
    if not handle.is_initialized:
        handle._init()
    return HandleClient(handle)


def connect_blocking() -> HandleClient:
    """Return the same for a process without a lasting event loop, such as a driver.

    Its router runs in a thread of its own, which throughput mode leaves out by default
    and without which each ``asyncio.run`` would lose it.
    """
    handle = serve.get_deployment_handle(CORE_NAME, APP_NAME)
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return HandleClient(handle)


async def fetch_status(core: DeploymentHandle[Any]) -> Mapping[str, Any]:
    """Return what a replica of the core reports: what is loaded, how busy it is, of what steps are.

    Raises:
        UnavailableError: None answers.
    """
    try:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            report: Mapping[str, Any] = await core.options(method_name="status").remote()
    except (RayError, RayServeException) as error:
        raise translate(error) from error
    except TimeoutError as error:
        message = f"core: expected a status within {STATUS_TIMEOUT_S:.0f} s, got none"
        raise UnavailableError(message) from error
    return report


def translate(error: Exception) -> TrimoeError:
    """Return our error for one that Ray raised; an error of ours inside comes out as it was."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, TrimoeError):
        return error.cause
    line = str(error).strip().splitlines()[-1:] or [""]
    message = f"{type(error).__name__}: {line[0]:.200}"
    if isinstance(error, BackPressureError):
        return QueueFullError(message)
    if isinstance(error, RayTaskError):
        return UnavailableError(message)
    return ReplicaLostError(message)


def _num_bytes(request: InferRequest) -> int:
    return request.features.nbytes + sum(each.nbytes for each in request.extras.values())
