"""The engine of a replica: admits requests, runs steps one after another, answers.

The event loop admits and schedules; one executor thread packs and launches steps, and on a
GPU another one waits for them, so that a step is packed while the one before it computes.
A request that arrives during a step may be part of the next one.  A step that fails is
run again request by request, so that one bad request does not fail its neighbours.

Versions: a request keeps the version it was admitted with (``cluster.versions``).
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np

from cluster.admission import admit
from cluster.cost import CostModel
from cluster.errors import TrimoeError, UnavailableError
from cluster.loading import LoadedModel, apart
from cluster.pending import PendingRequests
from cluster.recorder import NullRecorder, Recorder
from cluster.scheduler import Job, Limits, Scheduler, Step, count_tokens
from cluster.schemas import InferRequest, InferResponse, ServiceClass, Timings
from cluster.step import Answer, Pending, offsets
from cluster.telemetry import Telemetry
from cluster.versions import STABLE, Aliases, VersionRecord
from core_model.tasks import TaskSpec

LOG = logging.getLogger(__name__)

WARM_UP_SEQUENCES: Final = (1, 1, 32, 64)  # the first of a task pays one-time set-up, unlearned
WARM_UP_TOKENS: Final = 8192  # of a request, were its sequences as long as they may be
WARM_UP_ROWS: Final = 64  # of a sequence, at most
WARM_UP_DEADLINE_MS: Final = 60_000.0
WARM_UP_TENANT: Final = "warm-up"
SHADOW_TENANT: Final = "shadow"
SHADOW_DEADLINE_MS: Final = 10_000.0
GPU_DEPTH: Final = 2  # steps under way: one computes, one is packed
LAUNCH_LEAD: Final = 1.5  # of the usual time to pack and launch, before the GPU runs dry
LAUNCH_SLACK_MS: Final = 1.0
LAUNCH_MEMORY: Final = 0.2  # weight of the latest launch

Load = Callable[[str], LoadedModel]


@dataclass(slots=True, eq=False)
class _Progress:
    """What has come out for a job so far."""

    started: float
    compute_ms: float = 0.0
    answers: list[Answer] = field(default_factory=list)


class Engine:
    """Loaded models behind one scheduler.

    Args:
        model: What is stable at first.
        limits: Settings of the scheduler.
        recorder: Takes measurements.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        limits: Limits | None = None,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.aliases = Aliases(stable=model.version)
        self._models = {model.version: model}
        self._records: defaultdict[str, VersionRecord] = defaultdict(VersionRecord)
        self._clock = clock
        self._cost = CostModel()
        self._scheduler = Scheduler(self._cost, clock, limits)
        self._telemetry = Telemetry(recorder or NullRecorder())
        self._pending = PendingRequests()
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._collector = ThreadPoolExecutor(1, thread_name_prefix="collect")
        self._progress: WeakKeyDictionary[Job, _Progress] = WeakKeyDictionary()
        self._warm_keys: set[tuple[str, int]] = set()  # a first step of a size may compile kernels
        self._background: set[asyncio.Task[None]] = set()
        self._num_failed_in_a_row = 0
        self._heartbeat = self._step_ended = self._busy_until = clock()
        self._launch_ms = 0.0
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start running steps on the running event loop."""
        self._loop_task = asyncio.get_running_loop().create_task(self._run_steps())

    async def stop(self) -> None:
        """Fail what waits and end the loop after the steps in progress."""
        self._scheduler.close()
        if self._loop_task is not None:
            await self._loop_task
        for task in self._background:
            task.cancel()
        self._launcher.shutdown(wait=True)
        self._collector.shutdown(wait=True)

    async def warm_up(self, version: str | None = None) -> None:
        """Run blank requests of every task, so that the cost model starts from measurements."""
        model = self._models[version or self.aliases.stable]
        for spec in model.runner.tasks.values():
            for num_sequences in WARM_UP_SEQUENCES:
                room = 1 if spec.pieces > 1 else max(1, WARM_UP_TOKENS // spec.max_tokens)
                request = blank_request(spec, min(num_sequences, room))
                await self._answer(request, model)

    async def follow(self, aliases: Aliases, load: Load) -> None:
        """Load what aliases name and is not loaded, in a thread, then serve by them.

        Requests under way finish with their version; versions that no alias names are let go.

        Raises:
            TrimoeError: A version cannot be loaded; everything stays as it was.
        """
        for version in aliases.versions:
            if version not in self._models:
                self._models[version] = await asyncio.to_thread(apart, partial(load, version))
                try:
                    await self.warm_up(version)
                except TrimoeError:
                    del self._models[version]
                    raise
        LOG.info("aliases: %s", aliases)
        self.aliases = aliases
        self._models = {version: self._models[version] for version in aliases.versions}

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``cluster.client.Client``).

        Raises:
            InvalidRequestError: It does not fit its task.
            UnknownModelError: Its model version is not served.
            UnavailableError: Back-pressure, deadline, or a step that failed.
        """
        version = self.aliases.resolve(request.model_version, request.request_id)
        model = self._models[version]  # now: the version may be let go before the answer begins
        try:
            response = await self._pending.join(request, lambda: self._answer(request, model))
        except TrimoeError as error:
            self._telemetry.refused(request, version, error)
            raise
        is_shadowed = self.aliases.is_shadowed(request.request_id)
        if request.model_version == STABLE and is_shadowed and self._scheduler.has_spare_room:
            self._in_background(self._ask_shadow(request, response))
        return response

    def status(self) -> Mapping[str, Any]:
        """Return what is loaded and how busy it is; plain values only."""
        queued = self._scheduler.queued_tokens
        return {
            "model_version": self.aliases.stable,
            "models": [
                {
                    "model_version": version,
                    "aliases": self.aliases.names_of(version),
                    "tasks": sorted(model.runner.tasks),
                    "device": model.runner.device,
                    **self._records[version].report(),
                }
                for version, model in self._models.items()
            ],
            "waiting": self._scheduler.num_waiting,
            "queued_tokens": {str(each): tokens for each, tokens in queued.items()},
            "predicted_delay_ms": round(self._scheduler.predicted_delay_ms, 3),
            **self._telemetry.composition(),
            "stalled_s": round(self.stalled_s, 3),
            "failed_steps_in_a_row": self._num_failed_in_a_row,
        }

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait."""
        return sum(self._scheduler.queued_tokens.values())

    @property
    def predicted_delay_ms(self) -> float:
        """Predicted time until everything that waits is done."""
        return self._scheduler.predicted_delay_ms

    @property
    def num_failed_in_a_row(self) -> int:
        """Steps that have failed since the last one that did not."""
        return self._num_failed_in_a_row

    @property
    def stalled_s(self) -> float:
        """Seconds without progress while there is work; infinite if the loop has ended."""
        if self._loop_task is None or self._loop_task.done():
            return np.inf
        return 0.0 if self._scheduler.is_idle else self._clock() - self._heartbeat

    async def _answer(
        self, request: InferRequest, model: LoadedModel, *, is_spare: bool = False
    ) -> InferResponse:
        work = admit(request, model.runner.tasks, model.runner.num_layers)
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        job = Job(request, work, self._clock(), future, model, is_spare=is_spare)
        self._scheduler.submit(job)
        return await future

    async def _ask_shadow(self, request: InferRequest, response: InferResponse) -> None:
        """Ask the version on trial the same in spare time, and compare."""
        version = self.aliases.shadow
        model = None if version is None else self._models.get(version)
        if version is None or model is None:
            return
        copy = replace(
            request,
            tenant=SHADOW_TENANT,
            service_class=ServiceClass.BATCH,
            deadline_ms=SHADOW_DEADLINE_MS,
        )
        try:
            shadow = await self._answer(copy, model, is_spare=True)
        except UnavailableError:
            return  # no room for it: a shadow never costs the others anything
        spec = model.runner.tasks[request.task]
        disagreed = count_disagreements(response, shadow, spec.agree_within)
        record = self._records[version]
        record.num_shadowed += request.num_sequences
        record.num_disagreed += disagreed
        self._telemetry.shadowed(version, request.num_sequences, disagreed)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _run_steps(self) -> None:
        under_way: set[asyncio.Task[None]] = set()
        while step := await self._scheduler.next_step():
            self._heartbeat = started = self._clock()
            predicted_ms = self._cost.predict_ms(count_tokens(step))
            pendings, error = await self._launch(step)
            finishing = asyncio.create_task(self._finish_surely(step, started, pendings, error))
            under_way.add(finishing)
            if any(pending.done is not None for pending in pendings):
                under_way = await self._await_turn(under_way, started, predicted_ms)
            else:
                await asyncio.wait(under_way)
                under_way = set()
        if under_way:
            await asyncio.wait(under_way)

    async def _await_turn(
        self, under_way: "set[asyncio.Task[None]]", started: float, predicted_ms: float
    ) -> "set[asyncio.Task[None]]":
        """Wait until the next step should be planned; return the steps that still run.

        Late enough that what comes meanwhile is in it, early enough that the GPU never waits.
        """
        now = self._clock()
        self._launch_ms += LAUNCH_MEMORY * ((now - started) * 1e3 - self._launch_ms)
        self._busy_until = max(started, self._busy_until) + predicted_ms / 1e3
        left_s = self._busy_until - now - (LAUNCH_LEAD * self._launch_ms + LAUNCH_SLACK_MS) / 1e3
        if left_s > 0:
            _, under_way = await asyncio.wait(under_way, timeout=left_s)
        while len(under_way) >= GPU_DEPTH:
            _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        if not under_way:
            self._busy_until = self._clock()
        return under_way

    async def _launch(self, step: Step) -> tuple[Sequence[Pending], BaseException | None]:
        """Start a step, version by version; return what went wrong, if anything."""

        def launch() -> list[Pending]:
            in_order = sorted(step, key=lambda part: id(part.job.model))
            groups = groupby(in_order, key=lambda part: part.job.model)
            return [model.runner.launch(list(parts)) for model, parts in groups]

        running = asyncio.get_running_loop().run_in_executor(self._launcher, launch)
        await asyncio.wait([running])
        error = running.exception()
        return ([], error) if error is not None else (running.result(), None)

    async def _finish_surely(
        self, step: Step, started: float, pendings: Sequence[Pending], error: BaseException | None
    ) -> None:
        """Finish a step; if that itself fails its requests learn of it."""
        try:
            await self._finish(step, started, pendings, error)
        except Exception as failure:
            LOG.exception("a step was not finished")
            self._fail(step, failure)

    async def _finish(
        self, step: Step, started: float, pendings: Sequence[Pending], error: BaseException | None
    ) -> None:
        """Wait for a step, keep its answers, tell the scheduler and answer what is complete."""
        if error is None:
            error = await self._collect(pendings, started)
        is_healthy = error is None
        if error is not None and len(step) > 1:
            for part in step:
                alone, failed = await self._launch([part])
                failed = failed or await self._collect(alone, self._clock())
                self._fail([part], failed)
                is_healthy = is_healthy or failed is None
        elif error is not None:
            self._fail(step, error)
        now = self._clock()
        elapsed_ms = (now - max(started, self._step_ended)) * 1e3
        self._heartbeat = self._step_ended = now
        keys = {(key, tokens.bit_length()) for key, tokens in count_tokens(step).items()}
        is_typical = error is None and keys <= self._warm_keys
        self._scheduler.finish(step, elapsed_ms if is_typical else None)
        self._warm_keys |= keys
        self._num_failed_in_a_row = 0 if is_healthy else self._num_failed_in_a_row + 1
        self._telemetry.step(step, elapsed_ms, self._scheduler)
        self._deliver(step)

    async def _collect(self, pendings: Sequence[Pending], started: float) -> BaseException | None:
        """Wait for launched work and keep its answers; return what went wrong, if anything."""

        def collect() -> list[tuple[Job, Sequence[Answer]]]:
            return [
                (part.job, answers)
                for pending in pendings
                for part, answers in pending.runner.collect(pending).items()
            ]

        is_later = any(pending.done is not None for pending in pendings)
        executor = self._collector if is_later else self._launcher  # see cluster.loading.apart
        waiting = asyncio.get_running_loop().run_in_executor(executor, collect)
        await asyncio.wait([waiting])
        if (error := waiting.exception()) is not None:
            return error
        elapsed_ms = (self._clock() - started) * 1e3
        for job, answers in waiting.result():
            progress = self._progress.setdefault(job, _Progress(started))
            progress.answers += answers
            progress.compute_ms += elapsed_ms
        return None

    def _fail(self, step: Step, error: BaseException | None) -> None:
        for part in step:
            if error is not None and not part.job.future.done():
                message = (
                    f"request {part.job.request.request_id}: its step failed with "
                    f"{type(error).__name__}: {error!s:.200}"
                )
                part.job.future.set_exception(UnavailableError(message))
                self._records[_version(part.job)].num_failed += 1

    def _deliver(self, step: Step) -> None:
        """Answer the jobs whose last piece is done and that somebody still awaits."""
        for job in (part.job for part in step):
            if job.num_done == job.work.num_pieces and not job.future.done():
                response = _respond(job, self._progress[job])
                job.future.set_result(response)
                total_ms = (self._clock() - job.arrived) * 1e3
                if job.request.tenant not in (SHADOW_TENANT, WARM_UP_TENANT):
                    record = self._records[response.model_version]
                    record.num_ok += 1
                    record.latencies_ms.append(total_ms)
                self._telemetry.answered(job, response, total_ms)


def _version(job: Job) -> str:
    model = job.model
    return model.version if isinstance(model, LoadedModel) else "none"


def count_disagreements(ours: InferResponse, other: InferResponse, within: float) -> int:
    """Return how many sequences differ by more than a tolerance in their first output."""
    if not np.array_equal(ours.cu_seqlens, other.cu_seqlens):
        return ours.status.size
    differs = ~(np.abs(ours.outputs[:, 0] - other.outputs[:, 0]) <= within)
    return int(np.logical_or.reduceat(differs, ours.cu_seqlens[:-1]).sum()) if differs.size else 0


def blank_request(spec: TaskSpec, num_sequences: int) -> InferRequest:
    """Return a request of zeros, to warm up with."""
    rows = min(spec.max_rows, WARM_UP_ROWS)
    num_rows = num_sequences * rows
    counts = {"sequence": num_sequences, "row": num_rows}
    return InferRequest(
        request_id=f"warm-up-{num_sequences}",
        tenant=WARM_UP_TENANT,
        task=spec.name,
        features=np.zeros((num_rows, spec.d_task), dtype=np.float32),
        cu_seqlens=np.arange(0, num_rows + 1, rows, dtype=np.int32),
        extras={
            name: np.zeros((counts[extra.per], extra.width), dtype=extra.dtype)
            for name, extra in spec.extras.items()
        },
        service_class=ServiceClass.BATCH,
        deadline_ms=WARM_UP_DEADLINE_MS,
    )


def _respond(job: Job, progress: _Progress) -> InferResponse:
    answers = progress.answers
    return InferResponse(
        request_id=job.request.request_id,
        outputs=np.concatenate([each.outputs for each in answers]),
        cu_seqlens=offsets(np.concatenate([each.lengths for each in answers])),
        status=np.concatenate([each.status for each in answers]),
        model_version=_version(job),
        timings=Timings(
            queued_ms=(progress.started - job.arrived) * 1e3, compute_ms=progress.compute_ms
        ),
        tokens_per_expert=np.sum([each.tokens_per_expert for each in answers], axis=0),
    )
