"""Supervised workers: an application's service in Ray actors, restarted when they die.

A worker that is killed comes back and its service is built anew, for as long as it takes;
state is the service's own business.  A service that raises is built anew a bounded number
of times, with pauses that double; a ``ConfigurationError`` is final at once.  Either way
the last error reaches the caller of ``wait``.

The caller is synchronous; each worker has one supervising thread here.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.client import Client
from cluster.errors import ConfigurationError, ReplicaLostError, TrimoeError
from cluster.handle import connect, translate

LOG = logging.getLogger(__name__)
STOP_INTERVAL_S = 0.5  # a worker that restarts just now hears the next repetition


class Service(Protocol):
    """What an application runs in a worker."""

    async def run(self) -> None:
        """Work until told to stop, then drain and return."""
        ...

    def request_stop(self) -> None:
        """Ask ``run`` to drain and return."""
        ...


Build = Callable[[int, int, Client], Service]


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How long to try.

    Args:
        max_failures: Errors raised by a service in a row before it is given up.
        first_pause_s: Pause before the first restart; doubles with each in a row.
        longest_pause_s: No pause is longer.
        healthy_s: A run this long ends a row.
    """

    max_failures: int = 5
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    healthy_s: float = 30.0


class Worker:
    """The actor: builds the service on each run, in the actor's event loop."""

    def __init__(
        self, build: Build, index: int, num_workers: int, dial: Callable[[], Client]
    ) -> None:
        self._build = build
        self._place = (index, num_workers)
        self._dial = dial
        self._service: Service | None = None

    async def run(self) -> None:
        """Build the service and run it to its end."""
        self._service = self._build(*self._place, self._dial())
        await self._service.run()

    async def request_stop(self) -> None:
        """Ask the service, if there is one, to drain and return."""
        if self._service is not None:
            self._service.request_stop()

    @ray.method(max_task_retries=-1)
    async def pid(self) -> int:
        """Return the process id; a call outlives restarts."""
        return os.getpid()


class WorkerGroup:
    """Running workers and their supervision.

    Args:
        actors: Handles of ``Worker`` actors.
        policy: How long to try.
    """

    def __init__(self, actors: Sequence[Any], policy: RestartPolicy) -> None:
        self._actors = actors
        self._policy = policy
        self._stopping = threading.Event()
        self._num_restarts = [0] * len(actors)
        self._pool = ThreadPoolExecutor(len(actors), thread_name_prefix="supervise")
        self._futures: list[Future[None]] = [
            self._pool.submit(self._supervise, i) for i in range(len(actors))
        ]

    @property
    def num_restarts(self) -> Sequence[int]:
        """Restarts of each worker so far."""
        return tuple(self._num_restarts)

    def pids(self) -> Sequence[int]:
        """Return the process ids of the workers."""
        return [int(ray.get(actor.pid.remote())) for actor in self._actors]

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for all services to end; return whether they have.

        Raises:
            TrimoeError: The error of the first worker that was given up.
        """
        done, running = wait(self._futures, timeout_s, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return not running

    def stop(self, drain_s: float = 30.0) -> bool:
        """Ask all services to drain, wait, and end the actors; return whether all drained."""
        self._stopping.set()
        deadline = time.monotonic() + drain_s
        while any(not each.done() for each in self._futures) and time.monotonic() < deadline:
            for actor in self._actors:
                actor.request_stop.remote()
            wait(self._futures, STOP_INTERVAL_S)
        has_drained = all(each.done() and each.exception() is None for each in self._futures)
        for actor in self._actors:
            ray.kill(actor)
        self._pool.shutdown(wait=True)
        return has_drained

    def _supervise(self, index: int) -> None:
        """Run one worker until its service ends, stops or fails too often."""
        num_failures, pause_s = 0, self._policy.first_pause_s
        while True:
            started = time.monotonic()
            error = _run_once(self._actors[index])
            if error is None or self._stopping.is_set():
                return
            if time.monotonic() - started > self._policy.healthy_s:
                num_failures, pause_s = 0, self._policy.first_pause_s
            LOG.warning("worker %d restarts: %s", index, error)
            self._num_restarts[index] += 1
            if isinstance(error, ReplicaLostError):
                _await_restart(self._actors[index])
                continue
            num_failures += 1
            if isinstance(error, ConfigurationError) or num_failures > self._policy.max_failures:
                raise error
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, self._policy.longest_pause_s)


def run_workers(
    build: Build,
    num_workers: int,
    *,
    dial: Callable[[], Client] = connect,
    policy: RestartPolicy | None = None,
) -> WorkerGroup:
    """Start workers on the running Ray cluster and supervise them.

    Args:
        build: ``(index, num_workers, client) -> Service``; called in the worker, picklable.
        num_workers: How many.
        dial: Returns the worker's client; called in the worker.
        policy: How long to try.

    Raises:
        ConfigurationError: No worker asked for.
    """
    if num_workers < 1:
        message = f"workers: expected at least 1, got {num_workers}"
        raise ConfigurationError(message)
    actor_class = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(Worker)
    actors = [actor_class.remote(build, i, num_workers, dial) for i in range(num_workers)]
    return WorkerGroup(actors, policy or RestartPolicy())


def _run_once(actor: Any) -> TrimoeError | None:  # noqa: ANN401 - Ray's handles have no type
    """Run a worker's service; return why it ended, None if as it should."""
    try:
        ray.get(actor.run.remote())
    except RayTaskError as error:
        return translate(error)
    except RayActorError as error:
        return ReplicaLostError(f"worker process: {translate(error)}")
    except RayError as error:
        return translate(error)
    return None


def _await_restart(actor: Any) -> None:  # noqa: ANN401 - as above
    """Return when Ray has restarted the worker's process.

    Raises:
        ReplicaLostError: It never will: the process cannot be set up at all.
    """
    try:
        ray.get(actor.pid.remote())
    except RayError as error:
        raise translate(error) from error
