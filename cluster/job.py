"""A batch job: one request whose answer is fetched later, and where it stands."""

import asyncio
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from cluster.errors import JobNotDoneError
from cluster.schemas import InferResponse


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Job:
    """One job; fields other than ``state`` and times are set once.

    Args:
        job_id: Unique, unguessable.
        tenant: Whose it is.
        request_id: Of its request.
        task: Of its request.
        form: Content type it came in.
        created_at: When it was submitted.
        num_bytes: What it occupies.
        error: Why it failed.
    """

    job_id: str
    tenant: str
    request_id: str
    task: str
    form: str
    created_at: datetime
    num_bytes: int
    state: JobState = JobState.QUEUED
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = None
    error: Exception | None = None
    response: InferResponse | None = None
    running: "asyncio.Task[None] | None" = field(default=None, repr=False)
    expiry: asyncio.TimerHandle | None = field(default=None, repr=False)

    @property
    def result(self) -> InferResponse:
        """The answer.

        Raises:
            JobNotDoneError: There is none, or not yet.
        """
        if self.response is None:
            message = f"job {self.job_id}: expected it to be done, it is {self.state.value}"
            advice = "see its error" if self.state is JobState.FAILED else "ask again later"
            raise JobNotDoneError(f"{message}; {advice}")
        return self.response
