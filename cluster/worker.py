"""One worker: the Ray actor that runs an application's service, and tells when its node will go.

The actor builds the service in its own process and runs it in its event loop.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

import ray
from ray.exceptions import RayError

from cluster.client import Client

LOG = logging.getLogger(__name__)
DRAIN_LOOK_S = 1.0  # a node that is drained stays for a minute or so


class Service(Protocol):
    """What an application runs in a worker."""

    async def run(self) -> None:
        """Work until told to stop, then drain and return."""
        ...

    def request_stop(self) -> None:
        """Ask ``run`` to drain and return."""
        ...


Build = Callable[[int, int, Client], Service]


class Place(NamedTuple):
    """Where a worker runs."""

    pid: int
    node_id: str


class Worker:
    """The actor: builds the service on each run, in the actor's event loop."""

    def __init__(
        self, build: Build, index: int, num_workers: int, dial: Callable[[], Client]
    ) -> None:
        self._build = build
        self._share = (index, num_workers)
        self._dial = dial
        self._service: Service | None = None

    async def run(self) -> None:
        """Build the service and run it to its end."""
        self._service = self._build(*self._share, self._dial())
        await self._service.run()

    async def request_stop(self) -> None:
        """Ask the service, if there is one, to drain and return."""
        if self._service is not None:
            self._service.request_stop()

    async def leaving(self) -> None:
        """Return when the node of this process is being drained; the service goes on."""
        node_id = ray.get_runtime_context().get_node_id()
        while True:
            if node_id in await asyncio.to_thread(_draining_nodes):
                return
            await asyncio.sleep(DRAIN_LOOK_S)

    async def place(self) -> Place:
        """Return where this worker runs."""
        return Place(os.getpid(), ray.get_runtime_context().get_node_id())


def _draining_nodes() -> Collection[str]:
    from ray._private.state import state  # noqa: PLC0415 - there is no public way

    try:
        return state.get_draining_nodes()
    except (RayError, RuntimeError) as error:  # the head is away: nobody drains now
        LOG.warning("draining nodes are not known: %s", error)
        return ()
