"""The one Serve deployment: an engine in each replica.  Thin; policy is elsewhere."""

import asyncio
import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from ray import serve

from cluster.engine import Engine
from cluster.errors import TrimoeError, UnavailableError
from cluster.handle import CORE_NAME
from cluster.loading import ModelSource, apart, kernels_setting
from cluster.ray_metrics import RayRecorder
from cluster.schemas import InferRequest, InferResponse
from cluster.tracing import trace_answer
from cluster.versions import Aliases

LOG = logging.getLogger(__name__)

STALL_LIMIT_S = 30.0  # a step takes milliseconds; a loop this late is not coming back
FAILURE_LIMIT = 3  # failed steps in a row: a broken device fails them all
FOLLOW_PERIOD_S = 1.0  # how often the source's aliases are looked at


class CoreReplica:
    """One replica of the shared model.

    Args:
        source: Where models come from; runs inside the replica.
        torch_threads: Threads of one CPU step.
    """

    def __init__(self, source: ModelSource, torch_threads: int = 1) -> None:
        torch.set_num_threads(torch_threads)
        self._source = source
        aliases = source.aliases()
        model = apart(partial(source.load, aliases.stable))
        self._engine = Engine(model, recorder=RayRecorder())
        self._engine.start()
        loop = asyncio.get_running_loop()
        self._warm_up = loop.create_task(self._engine.warm_up())
        self._following = loop.create_task(self._follow(aliases))
        self._trouble = ""

    async def infer(self, request: InferRequest) -> InferResponse | TrimoeError:
        """Answer one request, or return why not; ``HandleClient`` raises that.

        A refusal that is raised costs Ray and Serve a formatted traceback and a line in the
        log, more than many an answer: an overloaded replica would be busy refusing.
        """
        try:
            response = await self._engine.infer(request)
        except TrimoeError as error:
            return error.with_traceback(None)
        trace_answer(request, response)
        return response

    async def status(self) -> Mapping[str, Any]:
        """Return what is loaded, how busy it is, and what its environment says of kernels."""
        return {
            "pid": os.getpid(),
            "kernels": kernels_setting(),
            **self._engine.status(),
            "aliases_error": self._trouble,
        }

    async def check_health(self) -> None:
        """Tell Serve whether this replica works; the first answer waits for the warm-up.

        Raises:
            UnavailableError: The step loop has ended, makes no progress or only fails.
        """
        await asyncio.shield(self._warm_up)
        if self._engine.stalled_s > STALL_LIMIT_S:
            message = f"step loop: no progress for {self._engine.stalled_s:.0f} s"
            raise UnavailableError(message)
        if self._engine.num_failed_in_a_row >= FAILURE_LIMIT:
            message = f"step loop: {self._engine.num_failed_in_a_row} failed steps in a row"
            raise UnavailableError(message)

    def record_autoscaling_stats(self) -> Mapping[str, float]:
        """Return what the autoscaling policy decides by."""
        return {
            "queued_tokens": float(self._engine.queued_tokens),
            "predicted_delay_ms": self._engine.predicted_delay_ms,
        }

    async def _follow(self, wanted: Aliases) -> None:
        """Serve what the source's aliases say, for as long as this replica lives."""
        await self._warm_up
        while True:
            if wanted != self._engine.aliases:
                try:
                    await self._engine.follow(wanted, self._source.load)
                except TrimoeError as error:
                    self._say(f"{type(error).__name__}: {error}")
                else:
                    self._say("")
            await asyncio.sleep(FOLLOW_PERIOD_S)
            try:
                wanted = await asyncio.to_thread(self._source.aliases)
            except (TrimoeError, OSError) as error:
                self._say(f"{type(error).__name__}: {error}")

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            LOG.error("aliases are not followed: %s", trouble)
        self._trouble = trouble


InferenceCore = serve.deployment(
    name=CORE_NAME,
    max_ongoing_requests=256,  # the scheduler orders them; Serve's default of 5 would cap steps
    health_check_period_s=5.0,
    health_check_timeout_s=60.0,
    graceful_shutdown_timeout_s=10.0,
)(CoreReplica)
