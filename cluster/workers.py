"""Supervised workers: an application's service in Ray actors, restarted when they die.

Workers are spread over the nodes of the cluster.  One that is killed, or whose node is lost,
comes back on the node with the fewest, and its service is built anew, for as long as it takes;
one whose node is drained goes on until its successor is up, finishes what it holds and is
replaced.  State is the service's own business.  A service that raises is built anew a bounded number of times, with pauses that
double, and so is a process that does not come up; a ``ConfigurationError`` is final at once.
Either way the last error reaches the caller of ``wait``.

The caller is synchronous; each worker has one supervising thread here.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.client import Client
from cluster.errors import ConfigurationError, ReplicaLostError, TrimoeError
from cluster.handle import connect, translate
from cluster.placement import Node, choose_node
from cluster.worker import Build, Job, Place, Worker

LOG = logging.getLogger(__name__)
STOP_INTERVAL_S = 0.5  # a worker that restarts just now hears the next repetition
SUSPECT_S = 30.0  # Ray believes in a lost node for 15 s by default: longer than that
NOMINAL_CPUS = 0.001  # without any Ray heeds no placement, 2026-11-24, docs/log.md#faults


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


class _Post(NamedTuple):
    """A process that is up, and its node."""

    actor: Any
    node_id: str


class WorkerGroup:
    """Running workers and their supervision.

    Args:
        start: Starts the worker of an index near a node and returns the actor's handle.
        num_workers: How many.
        policy: How long to try.
    """

    def __init__(
        self, start: Callable[[int, str | None], Any], num_workers: int, policy: RestartPolicy
    ) -> None:
        self._start = start
        self._policy = policy
        self._stopping = threading.Event()
        self._placing = threading.Lock()
        self._posts: dict[int, _Post] = {}
        self._starting: dict[int, _Post] = {}
        self._avoided_until: dict[str, float] = {}
        self._num_restarts = [0] * num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="supervise")
        self._futures: list[Future[None]] = [
            self._pool.submit(self._supervise, i) for i in range(num_workers)
        ]

    @property
    def num_restarts(self) -> Sequence[int]:
        """Restarts and moves of each worker so far."""
        return tuple(self._num_restarts)

    def places(self) -> Sequence[Place]:
        """Return where the workers run.

        Raises:
            ReplicaLostError: One of them is not up just now.
        """
        if len(self._posts) < len(self._num_restarts):
            message = "workers: expected all to be up, some are being started; ask again"
            raise ReplicaLostError(message)
        try:
            found = ray.get([post.actor.place.remote() for _, post in sorted(self._posts.items())])
        except RayError as error:
            raise translate(error) from error
        return [Place(*each) for each in found]

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
        """Ask all services to drain, wait, and end the actors; return whether all drained.

        A process that is not up yet has nothing to drain and is not waited for.
        """
        self._stopping.set()
        with self._placing:  # later nobody starts one
            starting = list(self._starting.values())
        for post in starting:
            ray.kill(post.actor)
        deadline = time.monotonic() + drain_s
        while any(not each.done() for each in self._futures) and time.monotonic() < deadline:
            for post in list(self._posts.values()):
                post.actor.request_stop.remote()
            wait(self._futures, STOP_INTERVAL_S)
        has_drained = all(each.done() and each.exception() is None for each in self._futures)
        self._end_all()  # or a service that does not drain would hold its thread
        self._pool.shutdown(wait=True)
        self._end_all()
        return has_drained

    def _end_all(self) -> None:
        for post in list(self._posts.values()):
            ray.kill(post.actor)

    def _supervise(self, index: int) -> None:
        """Run one worker until its service ends, stops or fails too often."""
        num_failures, pause_s = 0, self._policy.first_pause_s
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._run_once(index)
            except TrimoeError as error:
                reason = error
            else:
                return
            if self._stopping.is_set():
                return
            if time.monotonic() - started > self._policy.healthy_s:
                num_failures, pause_s = 0, self._policy.first_pause_s
            LOG.warning("worker %d restarts: %s", index, reason)
            self._num_restarts[index] += 1
            if isinstance(reason, _GoneError):
                continue
            num_failures += 1
            if isinstance(reason, ConfigurationError) or num_failures > self._policy.max_failures:
                raise reason
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, self._policy.longest_pause_s)

    def _run_once(self, index: int) -> None:
        """Run a worker's service, in the process there is or in a new one, to its proper end.

        Raises:
            _GoneError: The process is lost or replaced; the next run is in another one.
            TrimoeError: The service failed, or the process did not come up.
        """
        if index not in self._posts:
            self._posts[index] = self._settle(index)
        if self._stopping.is_set():
            return
        post, successor = self._posts[index], None
        ending, leaving = post.actor.run.remote(), post.actor.leaving.remote()
        try:
            ready, _ = ray.wait([ending, leaving])
            if leaving in ready:
                ray.get(leaving)  # raises if the process is lost instead
                self._avoided_until[post.node_id] = math.inf
                successor = self._find_successor(index)
                if successor is not None:
                    post.actor.request_stop.remote()
            ray.get(ending)
        except RayActorError as error:
            if isinstance(error, ActorUnavailableError):  # of a dead process its node would tell
                self._avoided_until[post.node_id] = time.monotonic() + SUSPECT_S
            self._replace(index, successor)
            message = f"worker process: {translate(error)}"
            raise _GoneError(message) from error
        except RayError as error:
            raise translate(error) from error
        if successor is not None:
            self._replace(index, successor)
            message = "its node is being drained"
            raise _GoneError(message)

    def _settle(self, index: int) -> _Post:
        """Start a process for a worker where the fewest are, and see that it is up.

        Raises:
            TrimoeError: It did not come up, or all stop.
        """
        with self._placing:
            if self._stopping.is_set():
                message = "workers: all stop, none is started"
                raise _GoneError(message)
            now = time.monotonic()
            avoided = {node for node, until in self._avoided_until.items() if until > now}
            posts = (*self._starting.values(), *self._posts.values())
            node = choose_node(_alive_nodes(), [post.node_id for post in posts], avoided)
            actor = self._start(index, node)
            self._starting[index] = _Post(actor, node or "")
        try:
            return _Post(actor, Place(*ray.get(actor.place.remote())).node_id)
        except RayError as error:
            ray.kill(actor)
            raise translate(error) from error
        finally:
            del self._starting[index]

    def _find_successor(self, index: int) -> _Post | None:
        """Start the process that will take over, None if that fails: then the node's end decides."""
        try:
            return self._settle(index)
        except TrimoeError as error:
            LOG.warning("worker %d stays on a node that is drained: %s", index, error)
            return None

    def _replace(self, index: int, successor: _Post | None) -> None:
        """End a worker's process, if it has not ended yet; its successor takes the place."""
        ray.kill(self._posts.pop(index).actor)
        if successor is not None:
            self._posts[index] = successor


class _GoneError(ReplicaLostError):
    """A worker's process ended, or has to: not the service's failure."""


def run_workers(
    build: Build,
    num_workers: int,
    *,
    dial: Callable[[], Client] = connect,
    policy: RestartPolicy | None = None,
    niceness: int = 0,
) -> WorkerGroup:
    """Start workers on the running Ray cluster and supervise them.

    Args:
        build: ``(index, num_workers, client) -> Service``; called in the worker, picklable.
        num_workers: How many.
        dial: Returns the worker's client; called in the worker.
        policy: How long to try.
        niceness: Of what the workers compute: on a machine that it shares with the platform,
            work that nobody waits for yields to whatever somebody does.

    Raises:
        ConfigurationError: No worker asked for.
    """
    if num_workers < 1:
        message = f"workers: expected at least 1, got {num_workers}"
        raise ConfigurationError(message)
    actor_class = ray.remote(num_cpus=NOMINAL_CPUS, max_restarts=0, max_task_retries=0)(Worker)
    job = Job(cloudpickle.dumps(build), num_workers, dial, niceness)
    shared = ray.put(job)  # once, however many workers and restarts; it may carry a table

    def start(index: int, node_id: str | None) -> Any:  # noqa: ANN401 - Ray's handles have no type
        strategy: Any = "DEFAULT"
        if node_id is not None:  # elsewhere if that node is full or leaves just now
            strategy = NodeAffinitySchedulingStrategy(
                node_id, soft=True, _spill_on_unavailable=True
            )
        placed = actor_class.options(scheduling_strategy=strategy)
        return placed.remote(shared, index)

    return WorkerGroup(start, num_workers, policy or RestartPolicy())


def _alive_nodes() -> Sequence[Node]:
    return [
        Node(node["NodeID"], node["Resources"].get("CPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]
