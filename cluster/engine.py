"""The engine of a replica: admits requests, runs steps one after another, answers.

The event loop admits and schedules; one executor thread packs, runs torch and splits.
A request that arrives during a step may be part of the next one.  A step that fails is
run again request by request, so that one bad request does not fail its neighbours.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np

from cluster.admission import admit
from cluster.cost import CostModel
from cluster.errors import UnavailableError, UnknownModelError
from cluster.scheduler import Job, Limits, Scheduler, Step
from cluster.schemas import InferRequest, InferResponse, Timings
from cluster.step import SliceResult, StepRunner, offsets
from core_model.tasks import TaskSpec

STABLE: Final = "stable"  # the alias of the version that is being served
WARM_UP_SEQUENCES = (1, 1, 32, 64)  # the first of a task pays one-time set-up and is not learned
WARM_UP_DEADLINE_MS = 60_000.0


@dataclass(slots=True, eq=False)
class _Answer:
    """What has come out for a job so far."""

    started: float
    compute_ms: float = 0.0
    results: list[SliceResult] = field(default_factory=list)


class Engine:
    """One loaded model behind a scheduler.

    Args:
        runner: Runs the steps of the loaded model.
        version: The model's version, as in its manifest.
        limits: Settings of the scheduler.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(
        self,
        runner: StepRunner,
        version: str,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.version = version
        self._runner = runner
        self._clock = clock
        self._scheduler = Scheduler(CostModel(sorted(runner.tasks)), clock, limits)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._answers: WeakKeyDictionary[Job, _Answer] = WeakKeyDictionary()
        self._warm_tasks: set[str] = set()
        self._num_steps = 0
        self._heartbeat = clock()
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start running steps on the running event loop."""
        self._loop_task = asyncio.get_running_loop().create_task(self._run_steps())

    async def stop(self) -> None:
        """Fail what waits and end the loop after the step in progress."""
        self._scheduler.close()
        if self._loop_task is not None:
            await self._loop_task
        self._executor.shutdown(wait=True)

    async def warm_up(self) -> None:
        """Run blank requests of every task, so that the cost model starts from measurements."""
        for spec in self._runner.tasks.values():
            for num_sequences in WARM_UP_SEQUENCES:
                await self.infer(_blank_request(spec, num_sequences))

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``cluster.client.Client``).

        Raises:
            InvalidRequestError: It does not fit its task.
            UnknownModelError: Its model version is not the one served.
            UnavailableError: Back-pressure, deadline, or a step that failed.
        """
        self._resolve(request.model_version)
        tokens = admit(request, self._runner.tasks)
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        job = Job(request, tokens, self._clock(), future)
        self._scheduler.submit(job)
        return await future

    def status(self) -> Mapping[str, Any]:
        """Return what is loaded and how busy it is; plain values only."""
        return {
            "model_version": self.version,
            "aliases": [STABLE],
            "tasks": sorted(self._runner.tasks),
            "device": self._runner.device,
            "waiting": self._scheduler.num_waiting,
            "steps": self._num_steps,
            "stalled_s": round(self.stalled_s, 3),
        }

    @property
    def stalled_s(self) -> float:
        """Seconds without progress while there is work; infinite if the loop has ended."""
        if self._loop_task is None or self._loop_task.done():
            return np.inf
        return 0.0 if self._scheduler.is_idle else self._clock() - self._heartbeat

    def _resolve(self, version: str) -> None:
        if version not in (STABLE, self.version):
            message = f"model version: expected {STABLE!r} or {self.version!r}, got {version!r}"
            raise UnknownModelError(message)

    async def _run_steps(self) -> None:
        while step := await self._scheduler.next_step():
            self._heartbeat = started = self._clock()
            error = await self._run(step, started)
            if error is not None and len(step) > 1:
                for part in step:
                    self._fail([part], await self._run([part], self._clock()))
            elif error is not None:
                self._fail(step, error)
            elapsed_ms = (self._clock() - started) * 1e3
            tasks = {part.job.request.task for part in step}
            is_typical = error is None and tasks <= self._warm_tasks
            self._scheduler.finish(step, elapsed_ms if is_typical else None)
            self._warm_tasks |= tasks
            self._num_steps += 1
            self._deliver(step)

    async def _run(self, step: Step, started: float) -> BaseException | None:
        """Run slices as one step and keep their results; return what went wrong, if anything."""
        running = asyncio.get_running_loop().run_in_executor(self._executor, self._runner.run, step)
        await asyncio.wait([running])
        if (error := running.exception()) is not None:
            return error
        elapsed_ms = (self._clock() - started) * 1e3
        for part, result in running.result().items():
            answer = self._answers.setdefault(part.job, _Answer(started))
            answer.results.append(result)
            answer.compute_ms += elapsed_ms
        return None

    def _fail(self, step: Step, error: BaseException | None) -> None:
        for part in step:
            if error is not None and not part.job.future.done():
                message = (
                    f"request {part.job.request.request_id}: its step failed with "
                    f"{type(error).__name__}: {error!s:.200}"
                )
                part.job.future.set_exception(UnavailableError(message))

    def _deliver(self, step: Step) -> None:
        """Answer the jobs whose last sequence is done and that somebody still awaits."""
        for job in (part.job for part in step):
            if job.num_done == job.request.num_sequences and not job.future.done():
                job.future.set_result(_respond(job, self._answers[job], self.version))


def _blank_request(spec: TaskSpec, num_sequences: int) -> InferRequest:
    num_rows = num_sequences * spec.max_rows
    counts = {"sequence": num_sequences, "row": num_rows}
    return InferRequest(
        request_id=f"warm-up-{num_sequences}",
        tenant="warm-up",
        task=spec.name,
        features=np.zeros((num_rows, spec.d_task), dtype=np.float32),
        cu_seqlens=np.arange(0, num_rows + 1, spec.max_rows, dtype=np.int32),
        extras={
            name: np.zeros((counts[extra.per], extra.width), dtype=extra.dtype)
            for name, extra in spec.extras.items()
        },
        deadline_ms=WARM_UP_DEADLINE_MS,
    )


def _respond(job: Job, answer: _Answer, version: str) -> InferResponse:
    results = answer.results
    return InferResponse(
        request_id=job.request.request_id,
        outputs=np.concatenate([each.outputs for each in results]),
        cu_seqlens=offsets(np.concatenate([each.lengths for each in results])),
        status=np.concatenate([each.status for each in results]),
        model_version=version,
        timings=Timings(
            queued_ms=(answer.started - job.arrived) * 1e3, compute_ms=answer.compute_ms
        ),
        tokens_per_expert=np.sum([each.tokens_per_expert for each in results], axis=0),
    )
