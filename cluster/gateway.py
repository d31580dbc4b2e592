"""The HTTP door on Ray Serve: the application of ``cluster.api`` as an ingress deployment.

One replica: rates and jobs are counted in its memory (docs/adr/0006).  It is closed
without API keys unless whoever starts it says that only this machine can connect.

    /metrics    the page of this node's Ray metric agent (see ``cluster.ray_metrics``)
    log lines   in the replica's log file of Serve, logger ``ray.serve.http``
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.api import ApiSettings, build_api
from cluster.backend import Backend
from cluster.errors import ConfigurationError
from cluster.handle import HandleClient, fetch_status
from cluster.keys import KEYS_VARIABLE, KeyFile, keys_path_from_environment
from cluster.ray_metrics import RayRecorder, fetch_metrics_page
from core_model.tasks import registered_tasks

STATUS_KEPT_S = 0.5  # anybody may ask /readyz; the core is not asked more often than this


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Settings of the door.

    Args:
        keys_path: File of API keys, where the replica runs.
        is_open: Whether to work without keys; only where nobody else can connect.
        api: Settings of the API; Ray's proxy echoes request ids itself.
    """

    keys_path: Path | None = None
    is_open: bool = False
    api: ApiSettings = field(default_factory=lambda: ApiSettings(echo_request_id=False))


class CoreStatus:
    """What the model core reports, asked for at most twice a second.

    Args:
        core: Handle of the core.
    """

    def __init__(self, core: DeploymentHandle[Any]) -> None:
        self._core = core
        self._lock = asyncio.Lock()
        self._report: Mapping[str, Any] = {}
        self._asked_at = -STATUS_KEPT_S

    async def __call__(self) -> Mapping[str, Any]:
        """Return the report.

        Raises:
            UnavailableError: The core does not answer.
        """
        async with self._lock:
            if time.monotonic() - self._asked_at >= STATUS_KEPT_S:
                self._report = await self._ask()
                self._asked_at = time.monotonic()
            return self._report

    async def _ask(self) -> Mapping[str, Any]:
        report = await fetch_status(self._core)
        nodes = await asyncio.to_thread(ray.nodes)
        alive = [node for node in nodes if node["Alive"]]
        return {**report, "ray": ray.__version__, "ray_nodes": len(alive)}


class GatewayReplica:
    """The one replica of the door.

    Args:
        core: Handle of the ``InferenceCore``.
        settings: None takes the file of API keys from the environment of the replica.

    Raises:
        ConfigurationError: No API keys, and it was not said to be open.
    """

    def __init__(
        self, core: DeploymentHandle[Any], settings: GatewaySettings | None = None
    ) -> None:
        self._settings = settings or GatewaySettings(keys_path_from_environment())
        path = self._settings.keys_path
        if path is None and not self._settings.is_open:
            message = f"gateway: expected a file of API keys, got none; set {KEYS_VARIABLE}"
            raise ConfigurationError(message)
        self._keys = None if path is None else KeyFile(path)
        self._core = core

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Serve calls it in the replica."""
        backend = Backend(
            client=HandleClient(self._core),
            status=CoreStatus(self._core),
            metrics_page=fetch_metrics_page,
            recorder=RayRecorder(),
            log=_request_log(),
        )
        return build_api(backend, registered_tasks(), self._keys, self._settings.api)


def _request_log() -> logging.Logger:
    """Return a logger that writes to the replica's log file at once.

    In throughput mode Serve keeps 1000 lines in memory before it writes them: too late for
    the line that says who was refused before the process died.
    """
    log = logging.getLogger("ray.serve.http")
    for handler in logging.getLogger("ray.serve").handlers:
        if isinstance(handler, MemoryHandler) and handler.target is not None:
            log.addHandler(handler.target)
            log.propagate = False
    return log


Gateway = serve.deployment(
    name="Gateway",
    num_replicas=1,
    max_ongoing_requests=512,
    max_queued_requests=512,
    backpressure_config={"status_code": 429, "retry_after_s": 1.0},
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_timeout_s=5.0,
    logging_config={"enable_access_log": False},  # ours says more, and nothing of the caller's
)(serve.ingress()(GatewayReplica))
