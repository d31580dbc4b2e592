"""The one Serve deployment: an engine in each replica.  Thin; policy is elsewhere."""

import asyncio
from collections.abc import Mapping
from typing import Any

import torch
from ray import serve

from cluster.engine import Engine
from cluster.errors import UnavailableError
from cluster.handle import CORE_NAME
from cluster.loading import Load
from cluster.schemas import InferRequest, InferResponse

STALL_LIMIT_S = 30.0  # a step takes milliseconds; a loop this late is not coming back


class CoreReplica:
    """One replica of the shared model.

    Args:
        load: Loads the model to serve; runs inside the replica.
        torch_threads: Threads of one CPU step.
    """

    def __init__(self, load: Load, torch_threads: int = 1) -> None:
        torch.set_num_threads(torch_threads)
        model = load()
        self._engine = Engine(model.runner, model.version)
        self._engine.start()
        self._warm_up = asyncio.get_running_loop().create_task(self._engine.warm_up())

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``cluster.client.Client``)."""
        return await self._engine.infer(request)

    async def status(self) -> Mapping[str, Any]:
        """Return what is loaded and how busy it is."""
        return self._engine.status()

    async def check_health(self) -> None:
        """Tell Serve whether this replica works; the first answer waits for the warm-up.

        Raises:
            UnavailableError: The step loop has ended or makes no progress.
        """
        await asyncio.shield(self._warm_up)
        if self._engine.stalled_s > STALL_LIMIT_S:
            message = f"step loop: no progress for {self._engine.stalled_s:.0f} s"
            raise UnavailableError(message)


InferenceCore = serve.deployment(
    name=CORE_NAME,
    max_ongoing_requests=256,  # the scheduler orders them; Serve's default of 5 would cap steps
    health_check_period_s=5.0,
    health_check_timeout_s=60.0,
    graceful_shutdown_timeout_s=10.0,
)(CoreReplica)
