"""One worker of a batch: claims cases from the shared journal and runs them until none is left.

A worker is a service of ``cluster.workers``: it runs in a supervised process that is given a
client and started anew when it dies.  Nobody hands it cases; driver and workers, of one batch
or of several drivers on one directory, meet in the journal alone.

Rules:
    1. A case that raises, or takes too long, is tried again and then quarantined; the others
       go on.
    2. No answer from the platform is nobody's fault: the case is tried again after a pause.
       If the platform is silent for long, the batch ends, to be resumed.
    3. What no case can get around (a full disk, a model that is not there) ends the batch.
    4. Told to stop, a worker claims nothing more, ends what it can and gives back the rest.
       A worker whose driver is gone gives back at once.
"""

import asyncio
import errno
import logging
import secrets
import time
import traceback
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from apps.imaging.batch.attempts import Attempt, Attempts, seal
from apps.imaging.batch.claims import FencedError, Kind, RetryLimits
from apps.imaging.batch.journal import Journal
from apps.imaging.batch.layout import Layout
from apps.imaging.batch.lease import Lease, LeaseWatch
from apps.imaging.batch.process import Process
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import Source
from apps.imaging.reasons import Reason
from cluster.client import Client
from cluster.errors import ConfigurationError, UnavailableError, UnknownModelError

LOG = logging.getLogger(__name__)
_APPS = Path(__file__).parents[2]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # no other case will fare better


NICENESS = 15  # of workers: a batch yields to those whose answers somebody waits for


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How a worker goes about it.

    Args:
        in_flight: Cases it holds at once: one is read while another is computed.
        limits: How often a case is tried.
        limit_s: An attempt that takes longer has failed.
        lease_s: A process that is silent for longer is presumed dead; one that ended is
            known to be.
        drain_s: How long cases may go on once it is told to stop.
        look_s: Pause between two looks at the journal while there is nothing to claim.
        first_pause_s: Pause after the platform gave no answer; doubles with each in a row.
        longest_pause_s: No pause is longer.
        patience_s: The platform may be silent for so long.
    """

    in_flight: int = 2
    limits: RetryLimits = field(default_factory=RetryLimits)
    limit_s: float = 1800.0
    lease_s: float = 60.0
    drain_s: float = 20.0
    look_s: float = 0.5
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    patience_s: float = 900.0


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What every worker is built from; travels to its process.

    Args:
        out: Output directory, absolute, the same on every machine.
        driver: Name of the driver's lease.
        sources: Cases of this shard, in order.
        process: Runs one.
        settings: How a worker goes about it.
    """

    out: Path
    driver: str
    sources: tuple[Source, ...]
    process: Process
    settings: WorkerSettings

    def __call__(self, index: int, num_workers: int, client: Client) -> "CaseWorker":
        """Build one worker."""
        del num_workers  # they share by claims, not by number
        name = f"{self.driver}-{index}-{secrets.token_hex(4)}"
        return CaseWorker(self, name, client)


class CaseWorker:
    """Runs cases; a ``cluster.worker.Service``.

    Args:
        plan: What to run.
        name: Of its lease, never used before.
        client: Reaches the model.
    """

    def __init__(self, plan: WorkerPlan, name: str, client: Client) -> None:
        self._plan = plan
        self._name = name
        self._client = client
        self._layout = Layout(plan.out)
        self._sources = {each.case_id: each for each in plan.sources}
        self._watch = LeaseWatch(self._layout.leases, plan.settings.lease_s)
        self._stopping = asyncio.Event()
        self._silent_since_s: float | None = None
        self._pause_s = plan.settings.first_pause_s

    def request_stop(self) -> None:
        """Ask ``run`` to claim nothing more, end what runs, and return."""
        self._stopping.set()

    async def run(self) -> None:
        """Run cases until all have a result, or until told to stop.

        Raises:
            ConfigurationError: No case can be processed; or the platform is silent.
            UnavailableError: The journal cannot be locked.
        """
        if not self._layout.journal.is_file():
            message = "output directory: expected that of the batch on this machine too, got none"
            raise ConfigurationError(message)
        with ExitStack() as stack:
            lease_s = self._plan.settings.lease_s
            stack.enter_context(Lease(self._layout.leases, self._name, lease_s))
            journal = stack.enter_context(Journal(self._layout.journal))
            journal.refresh()
            attempts = Attempts(
                self._layout,
                journal,
                self._watch,
                self._name,
                self._sources,
                self._plan.settings.limits,
            )
            await self._work(attempts)

    async def _work(self, attempts: Attempts) -> None:
        running: dict[asyncio.Task[None], Attempt] = {}
        try:
            while self._may_go_on() and not attempts.are_over():
                attempt = self._claim(attempts, list(running.values()))
                if attempt is not None:
                    running[asyncio.create_task(self._run(attempts, attempt))] = attempt
                else:
                    await self._wait(running, self._plan.settings.look_s)
            if self._has_driver():
                await self._drain(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _may_go_on(self) -> bool:
        return not self._stopping.is_set() and self._has_driver()

    def _has_driver(self) -> bool:
        return self._watch.is_held(self._plan.driver)

    def _claim(self, attempts: Attempts, running: list[Attempt]) -> Attempt | None:
        has_room = len(running) < self._plan.settings.in_flight
        if not has_room or any(attempt.is_alone for attempt in running):
            return None
        return attempts.claim(alone=not running)

    async def _wait(self, running: dict[asyncio.Task[None], Attempt], timeout_s: float) -> None:
        """Wait for an attempt to end or for the word to stop; raise what ends the batch."""
        stop = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait(
                [stop, *running], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            stop.cancel()
        for task in running.keys() & done:
            del running[task]
            task.result()

    async def _drain(self, running: dict[asyncio.Task[None], Attempt]) -> None:
        if running:
            done, _ = await asyncio.wait(running, timeout=self._plan.settings.drain_s)
            for task in done:
                del running[task]
                task.result()

    async def _run(self, attempts: Attempts, attempt: Attempt) -> None:
        """Run one attempt to its end, whatever that is.

        Raises:
            ConfigurationError: See ``run``.
        """
        try:
            summary = await self._process(attempt)
            files = await asyncio.to_thread(seal, attempt.directory)
            attempts.commit(attempt, summary, files)
        except FencedError:
            LOG.warning("case %s: another worker has taken over", attempt.case_id)
            attempts.end(attempt, Kind.RELEASED)
        except asyncio.CancelledError:
            attempts.end(attempt, Kind.RELEASED)
            raise
        except Exception as error:  # noqa: BLE001 - one case must not take others with it
            await self._fail(attempts, attempt, error)
        else:
            self._silent_since_s, self._pause_s = None, self._plan.settings.first_pause_s

    async def _process(self, attempt: Attempt) -> CaseSummary:
        limit_s = self._plan.settings.limit_s
        source = self._sources[attempt.case_id]
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                return await self._plan.process(source, attempt.directory, self._client)
        except TimeoutError as error:
            if not limit.expired():
                raise
            message = f"not done within {limit_s:.0f} s"
            raise _TooLongError(message) from error

    async def _fail(self, attempts: Attempts, attempt: Attempt, error: Exception) -> None:
        if isinstance(error, UnavailableError):
            await self._wait_for_platform(attempts, attempt, error)
            return
        if (full := _full_disk(error)) is not None:
            attempts.end(attempt, Kind.RELEASED)
            message = f"output directory: expected room to write, got {full.strerror}"
            raise ConfigurationError(message) from error
        if isinstance(error, (ConfigurationError, UnknownModelError)):
            attempts.end(attempt, Kind.RELEASED)
            raise error
        reason = _reason_of(error)
        LOG.warning("case %s: %s, %s", attempt.case_id, reason.code, reason.detail)
        attempts.end(attempt, Kind.FAILED, reason)

    async def _wait_for_platform(
        self, attempts: Attempts, attempt: Attempt, error: UnavailableError
    ) -> None:
        """Give a case back and pause; in its place among those under way, so the rest does too."""
        reason = Reason("PLATFORM_UNAVAILABLE", type(error).__name__)
        attempts.end(attempt, Kind.UNAVAILABLE, reason)
        now_s = time.monotonic()
        self._silent_since_s = self._silent_since_s or now_s
        if now_s - self._silent_since_s > self._plan.settings.patience_s:
            _give_up(error, now_s - self._silent_since_s)
        pause_s, self._pause_s = (
            self._pause_s,
            min(2 * self._pause_s, self._plan.settings.longest_pause_s),
        )
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause_s)


class _TooLongError(Exception):
    """An attempt took longer than it may."""


def _give_up(error: UnavailableError, silent_s: float) -> NoReturn:
    message = (
        f"platform: expected answers, got none for {silent_s:.0f} s, the last "
        f"{type(error).__name__}; see `trimoe status`, then go on with --resume"
    )
    raise ConfigurationError(message) from error


def _full_disk(error: BaseException) -> OSError | None:
    """Return what says that nothing can be written, if that is behind an error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _reason_of(error: Exception) -> Reason:
    """Return what may be told of an error: its kind and a line of code, never its text."""
    if isinstance(error, _TooLongError):
        return Reason("TIME_LIMIT", str(error))
    frames = traceback.extract_tb(error.__traceback__)
    apps = [each for each in frames if Path(each.filename).is_relative_to(_APPS)]
    last = ([each for each in apps if each.filename != __file__] or frames)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return Reason("PROCESS_FAILED", f"{type(error).__name__} at {where}")
