"""One worker: the Ray actor that runs an application's service, and tells when its node will go.

The actor builds the service in its own process and runs it in its event loop.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

import ray
from ray import cloudpickle
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


class Job(NamedTuple):
    """What workers run.

    Args:
        build: A pickled ``Build``: its imports, too, run at the worker's priority.
        num_workers: How many there are.
        dial: Returns a worker's client.
        niceness: Of what a worker computes, as of ``nice``.
    """

    build: bytes
    num_workers: int
    dial: Callable[[], Client]
    niceness: int = 0


class Worker:
    """The actor: builds the service on each run, in the actor's event loop."""

    def __init__(self, job: Job, index: int) -> None:
        self._job, self._index = job, index
        self._service: Service | None = None

    async def run(self) -> None:
        """Build the service and run it to its end."""
        job = self._job
        yield_to_others(job.niceness)
        build: Build = cloudpickle.loads(job.build)
        self._service = build(self._index, job.num_workers, job.dial())
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


def yield_to_others(niceness: int) -> None:
    """Lower the priority of this thread and of those it starts, such as ``to_thread``'s."""
    own = threading.get_native_id()
    current = os.getpriority(os.PRIO_PROCESS, own)
    os.setpriority(os.PRIO_PROCESS, own, max(current, niceness))


def _draining_nodes() -> Collection[str]:
    from ray._private.state import state  # noqa: PLC0415 - there is no public way

    try:
        return state.get_draining_nodes()
    except (RayError, RuntimeError) as error:  # the head is away: nobody drains now
        LOG.warning("draining nodes are not known: %s", error)
        return ()
