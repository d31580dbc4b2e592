"""Jobs with a fake client: their states, their bounds, their owners, their end."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from cluster.errors import (
    JobNotDoneError,
    QueueFullError,
    ReplicaLostError,
    UnavailableError,
    UnknownJobError,
)
from cluster.job import Job, JobState
from cluster.jobs import JobBoard, JobLimits
from cluster.schemas import InferRequest

if TYPE_CHECKING:
    from tests.cluster.conftest import FakeClient

Make = Callable[..., InferRequest]
Scenario = Coroutine[Any, Any, None]
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


async def settle(*jobs: Job) -> None:
    """Wait until jobs have finished."""
    await asyncio.gather(*(job.running for job in jobs if job.running), return_exceptions=True)


def test_a_job_waits_runs_and_is_done(fake_client: "FakeClient", make_request: Make) -> None:
    async def scenario() -> None:
        fake_client.gate = asyncio.Event()
        board = JobBoard(fake_client, now=lambda: NOON)
        job = board.submit(make_request(), "form")
        assert (job.state, job.created_at, job.started_at) == (JobState.QUEUED, NOON, None)
        await fake_client.asked.wait()
        assert job.state.value == "running"
        with pytest.raises(JobNotDoneError, match="expected it to be done, it is running"):
            _ = job.result
        fake_client.gate.set()
        await settle(job)
        assert (job.state.value, job.finished_at, job.error) == ("done", NOON, None)
        assert job.result.request_id == "r0"
        assert job.expires_at is not None
        assert (job.expires_at - NOON).total_seconds() == 3600.0
        await board.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [ReplicaLostError("gone"), ValueError("secret 4711")], ids=repr)
def test_a_job_that_fails_keeps_its_error_and_no_bytes(
    fake_client: "FakeClient",
    make_request: Make,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        fake_client.error = error
        board = JobBoard(fake_client)
        job = board.submit(make_request(), "form")
        await settle(job)
        assert (job.state, job.num_bytes) == (JobState.FAILED, 0)
        assert isinstance(job.error, UnavailableError)
        with pytest.raises(JobNotDoneError, match="it is failed; see its error"):
            _ = job.result
        await board.close()

    asyncio.run(scenario())
    assert "4711" not in caplog.text


def test_another_tenants_job_does_not_exist(fake_client: "FakeClient", make_request: Make) -> None:
    async def scenario() -> None:
        board = JobBoard(fake_client)
        job = board.submit(make_request(tenant="alpha"), "form")
        for attempt in (board.find, board.delete):
            with pytest.raises(UnknownJobError) as theirs:
                attempt("beta", job.job_id)
            with pytest.raises(UnknownJobError) as nobodys:
                attempt("beta", "x" * len(job.job_id))
            assert str(theirs.value).replace(job.job_id, "") == str(nobodys.value).replace(
                "x" * len(job.job_id), ""
            )
        assert board.of_tenant("beta") == []
        assert board.find("alpha", job.job_id) is board.find(None, job.job_id) is job
        await board.close()

    asyncio.run(scenario())


def test_a_tenant_has_so_many_jobs_and_bytes_and_others_have_theirs(
    fake_client: "FakeClient", make_request: Make
) -> None:
    request = make_request((40,))
    size = request.features.nbytes + request.extras["context"].nbytes + 8

    async def scenario() -> None:
        fake_client.gate = asyncio.Event()
        board = JobBoard(fake_client, JobLimits(jobs_per_tenant=2, bytes_per_tenant=2 * size))
        jobs = [board.submit(request, "form") for _ in range(2)]
        with pytest.raises(QueueFullError, match="expected at most 2 jobs"):
            board.submit(request, "form")
        board.submit(replace(request, tenant="other"), "form")
        board.delete("t", jobs[0].job_id)
        with pytest.raises(QueueFullError, match=f"jobs of {2 * size} bytes at most"):
            board.submit(make_request((40, 1)), "form")
        board.submit(request, "form")
        await board.close()
        assert board.of_tenant(None) == []

    asyncio.run(scenario())


def test_all_tenants_together_have_so_many_bytes_and_jobs(
    fake_client: "FakeClient", make_request: Make
) -> None:
    async def scenario() -> None:
        fake_client.gate = asyncio.Event()
        for limits in (JobLimits(total_jobs=3), JobLimits(total_bytes=350)):
            board = JobBoard(fake_client, limits)
            for i in range(3):
                board.submit(make_request(tenant=f"t{i}"), "form")
            with pytest.raises(QueueFullError):
                board.submit(make_request(tenant="one-more"), "form")
            await board.close()

    asyncio.run(scenario())


def test_a_result_counts_instead_of_its_request(
    fake_client: "FakeClient", make_request: Make
) -> None:
    async def scenario() -> None:
        board = JobBoard(fake_client)
        job = board.submit(make_request((40,)), "form")
        before = job.num_bytes
        await settle(job)
        assert 0 < job.num_bytes < before
        await board.close()

    asyncio.run(scenario())


def test_of_one_tenant_a_few_run_at_once_in_order_of_arrival(
    fake_client: "FakeClient", make_request: Make
) -> None:
    async def scenario() -> None:
        fake_client.gate = asyncio.Event()
        board = JobBoard(fake_client, JobLimits(running_per_tenant=2))
        jobs = [board.submit(make_request(request_id=f"r{i}"), "form") for i in range(5)]
        other = board.submit(make_request(tenant="other", request_id="other"), "form")
        await asyncio.sleep(0.01)
        assert [job.state.value for job in jobs] == ["running"] * 2 + ["queued"] * 3
        assert other.state is JobState.RUNNING
        fake_client.gate.set()
        await settle(*jobs)
        asked = [request.request_id for request in fake_client.requests]
        assert [each for each in asked if each != "other"] == [f"r{i}" for i in range(5)]
        await board.close()

    asyncio.run(scenario())


def test_the_deadline_counts_from_submission(fake_client: "FakeClient", make_request: Make) -> None:
    async def scenario() -> None:
        fake_client.gate = asyncio.Event()
        board = JobBoard(fake_client, JobLimits(running_per_tenant=1))
        first = board.submit(make_request(deadline_ms=60_000.0), "form")
        late = board.submit(make_request(deadline_ms=20.0), "form")
        patient = board.submit(make_request(deadline_ms=60_000.0), "form")
        await asyncio.sleep(0.05)
        fake_client.gate.set()
        await settle(first, late, patient)
        assert type(late.error).__name__ == "DeadlineExceededError"
        assert [request.deadline_ms < 60_000.0 for request in fake_client.requests] == [True] * 2
        assert fake_client.requests[1].deadline_ms <= 59_960.0
        await board.close()

    asyncio.run(scenario())


def test_deleting_a_running_job_cancels_it(fake_client: "FakeClient", make_request: Make) -> None:
    async def scenario() -> None:
        fake_client.gate = asyncio.Event()
        board = JobBoard(fake_client, JobLimits(running_per_tenant=1))
        running, waiting = (board.submit(make_request(), "form") for _ in range(2))
        await fake_client.asked.wait()
        board.delete("t", running.job_id)
        fake_client.gate.set()
        await settle(running, waiting)
        assert running.running is not None
        assert running.running.cancelled()
        assert waiting.state is JobState.DONE
        with pytest.raises(UnknownJobError):
            board.find("t", running.job_id)
        await board.close()

    asyncio.run(scenario())


def test_a_finished_job_expires_and_its_room_is_free_again(
    fake_client: "FakeClient", make_request: Make
) -> None:
    async def scenario() -> None:
        board = JobBoard(fake_client, JobLimits(keep_s=0.2, jobs_per_tenant=1))
        job = board.submit(make_request(), "form")
        await settle(job)
        assert board.find("t", job.job_id) is job
        with pytest.raises(QueueFullError):
            board.submit(make_request(), "form")
        await asyncio.sleep(0.4)
        with pytest.raises(UnknownJobError, match="it may have expired"):
            board.find("t", job.job_id)
        board.submit(make_request(), "form")
        await board.close()

    asyncio.run(scenario())
