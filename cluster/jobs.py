"""Batch jobs: requests whose answer is fetched later, bounded per tenant, gone after a while.

    queued -> running -> done | failed,  and from each of them: deleted, expired

Rules:
    1. A job is its tenant's: to another tenant it does not exist.
    2. A tenant has a bounded number of jobs and of bytes; one more is refused, none dropped.
    3. Of one tenant ``running_per_tenant`` run at once, in the order of arrival; among
       tenants the replica's scheduler decides.
    4. The deadline counts from submission; deleting a job cancels it.
    5. A finished job expires, with its result, ``keep_s`` after it finished.

Jobs live in the memory of one process (docs/adr/0006): a restart forgets them, and their
owner, who then finds none of that id, submits again.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from cluster.client import Client
from cluster.errors import (
    DeadlineExceededError,
    QueueFullError,
    TrimoeError,
    UnavailableError,
    UnknownJobError,
)
from cluster.job import Job, JobState
from cluster.recorder import NullRecorder, Recorder
from cluster.schemas import InferRequest, InferResponse

LOG = logging.getLogger(__name__)
JOB_ID_BYTES = 16  # nobody guesses one


@dataclass(frozen=True, slots=True)
class JobLimits:
    """How many jobs, how large and for how long.

    Args:
        jobs_per_tenant: Jobs of a tenant, finished ones included.
        bytes_per_tenant: Bytes of its requests that wait or run, and of its results.
        total_bytes: The same over all tenants; a result may go beyond, a new request not.
        total_jobs: The same over all tenants; matters where anybody may name one.
        running_per_tenant: Jobs of a tenant that run at once.
        keep_s: A finished job is kept that long.
    """

    jobs_per_tenant: int = 64
    bytes_per_tenant: int = 256 * 2**20
    total_bytes: int = 2**30
    total_jobs: int = 4096
    running_per_tenant: int = 4
    keep_s: float = 3600.0


class JobBoard:
    """All jobs of this process; not to be shared between event loops.

    Args:
        client: Answers their requests.
        limits: See ``JobLimits``.
        recorder: Takes the metric of outcomes.
        now: Returns the time of day.
    """

    def __init__(
        self,
        client: Client,
        limits: JobLimits | None = None,
        *,
        recorder: Recorder | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._limits = limits or JobLimits()
        self._recorder = recorder or NullRecorder()
        self._now = now
        self._jobs: dict[str, Job] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}

    def submit(self, request: InferRequest, form: str) -> Job:
        """Take a request and return its job, which runs by itself.

        Args:
            request: Of the job's tenant.
            form: Content type it came in.

        Raises:
            QueueFullError: The tenant has no room for one more.
        """
        job = Job(
            job_id=secrets.token_urlsafe(JOB_ID_BYTES),
            tenant=request.tenant,
            request_id=request.request_id,
            task=request.task,
            form=form,
            created_at=self._now(),
            num_bytes=_bytes_of_request(request),
        )
        self._check_room(job)
        self._jobs[job.job_id] = job
        job.running = asyncio.get_running_loop().create_task(self._run(job, request))
        return job

    def find(self, tenant: str | None, job_id: str) -> Job:
        """Return a tenant's job; without a tenant, anybody's.

        Raises:
            UnknownJobError: There is none.
        """
        job = self._jobs.get(job_id)
        if job is None or tenant not in (None, job.tenant):
            message = f"job {job_id!r:.40}: expected a job of yours, there is none; it may have "
            raise UnknownJobError(message + "expired, or the platform was restarted: submit again")
        return job

    def of_tenant(self, tenant: str | None) -> Sequence[Job]:
        """Return a tenant's jobs, oldest first; without a tenant, all."""
        return [job for job in self._jobs.values() if tenant in (None, job.tenant)]

    def delete(self, tenant: str | None, job_id: str) -> None:
        """Cancel and forget a tenant's job.

        Raises:
            UnknownJobError: There is none.
        """
        self._forget(self.find(tenant, job_id))

    async def close(self) -> None:
        """Cancel and forget everything."""
        running = [job.running for job in self._jobs.values() if job.running is not None]
        for job in list(self._jobs.values()):
            self._forget(job)
        await asyncio.gather(*running, return_exceptions=True)

    def _check_room(self, job: Job) -> None:
        theirs = self.of_tenant(job.tenant)
        num_bytes = job.num_bytes + sum(each.num_bytes for each in theirs)
        total = job.num_bytes + sum(each.num_bytes for each in self._jobs.values())
        limits = self._limits
        if len(theirs) >= limits.jobs_per_tenant or len(self._jobs) >= limits.total_jobs:
            message = f"tenant {job.tenant}: expected at most {limits.jobs_per_tenant} jobs, got "
            raise QueueFullError(message + "one more; delete finished ones")
        if num_bytes > limits.bytes_per_tenant or total > limits.total_bytes:
            message = f"tenant {job.tenant}: expected jobs of {limits.bytes_per_tenant} bytes at "
            raise QueueFullError(message + f"most, got {num_bytes}; delete finished ones")

    async def _run(self, job: Job, request: InferRequest) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + request.deadline_ms / 1e3
        slots = asyncio.Semaphore(self._limits.running_per_tenant)
        try:
            async with self._slots.setdefault(job.tenant, slots):
                job.state, job.started_at = JobState.RUNNING, self._now()
                job.response = await self._ask(request, (deadline_s - loop.time()) * 1e3)
            job.num_bytes = _bytes_of_response(job.response)
            self._finish(job, JobState.DONE)
        except TrimoeError as error:
            job.error = error
            self._finish(job, JobState.FAILED)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job has failed by it
            LOG.error("job %s: %s", job.job_id, type(error).__name__)  # noqa: TRY400 - no payload
            job.error = UnavailableError(f"job {job.job_id}: failed inside the platform")
            self._finish(job, JobState.FAILED)

    async def _ask(self, request: InferRequest, left_ms: float) -> InferResponse:
        if left_ms <= 0:
            message = f"request {request.request_id}: its deadline passed before its turn came"
            raise DeadlineExceededError(message)
        return await self._client.infer(replace(request, deadline_ms=left_ms))

    def _finish(self, job: Job, state: JobState) -> None:
        job.state, job.finished_at = state, self._now()
        if job.error is not None:
            job.num_bytes = 0
        job.expires_at = job.finished_at + timedelta(seconds=self._limits.keep_s)
        loop = asyncio.get_running_loop()
        job.expiry = loop.call_later(self._limits.keep_s, self._forget, job)
        self._recorder.record("trimoe_jobs_total", 1, {"outcome": state.value})

    def _forget(self, job: Job) -> None:
        if job.expiry is not None:
            job.expiry.cancel()
        if job.running is not None:
            job.running.cancel()
        self._jobs.pop(job.job_id, None)
        if not self.of_tenant(job.tenant):
            self._slots.pop(job.tenant, None)


def _bytes_of_request(request: InferRequest) -> int:
    extras = sum(extra.nbytes for extra in request.extras.values())
    return request.features.nbytes + request.cu_seqlens.nbytes + extras


def _bytes_of_response(response: InferResponse) -> int:
    return response.outputs.nbytes + response.cu_seqlens.nbytes + response.tokens_per_expert.nbytes
