"""What people do instead, as Serve deployments over the same model: the benchmark's peers.

    Fifo        one request per forward pass, in order of arrival
    Tokens      ``@serve.batch`` by tokens: whole requests, joined up to a number of tokens
    Padded      a fixed number of sequences a batch, padded to the longest (in process)

Each runs the step of our engine (``cluster.step``), so only the policy differs.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ray import serve

from cluster.admission import admit
from cluster.loading import LoadedModel, ModelSource, apart
from cluster.scheduler import Job, Slice
from cluster.schemas import InferRequest, InferResponse, Timings
from cluster.step import Answer, offsets

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BATCH_TOKENS = 8192
MAX_BATCH_WAIT_S = 0.002


class _Runner:
    """A model and its executor thread."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._executor = ThreadPoolExecutor(1)

    async def run(self, requests: list[InferRequest]) -> list[InferResponse]:
        """Run requests as one step."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._run, requests)

    def _run(self, requests: list[InferRequest]) -> list[InferResponse]:
        runner = self.model.runner
        works = [admit(request, runner.tasks, runner.num_layers) for request in requests]
        jobs = [
            Job(request, work, 0.0, None, self.model)  # type: ignore[arg-type]  # nobody awaits it
            for request, work in zip(requests, works, strict=True)
        ]
        step = [Slice(job, 0, job.work.num_pieces) for job in jobs]
        answers = runner.run(step)
        return [
            _respond(request, answers[part], self.model.version)
            for request, part in zip(requests, step, strict=True)
        ]


def _respond(request: InferRequest, answers: Any, version: str) -> InferResponse:  # noqa: ANN401 - sequence of answers
    parts: list[Answer] = list(answers)
    return InferResponse(
        request_id=request.request_id,
        outputs=np.concatenate([each.outputs for each in parts]),
        cu_seqlens=offsets(np.concatenate([each.lengths for each in parts])),
        status=np.concatenate([each.status for each in parts]),
        model_version=version,
        timings=Timings(0.0, 0.0),
        tokens_per_expert=np.sum([each.tokens_per_expert for each in parts], axis=0),
    )


class FifoReplica:
    """One request per forward pass."""

    def __init__(self, source: ModelSource, torch_threads: int) -> None:
        torch.set_num_threads(torch_threads)
        self._runner = _Runner(apart(partial(source.load, source.aliases().stable)))

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request."""
        return (await self._runner.run([request]))[0]


def _num_tokens(requests: list[InferRequest]) -> int:
    """Tokens of requests, near enough for both tasks."""
    return sum(
        request.features.shape[0] if request.task == "tokens" else 3 * request.num_sequences
        for request in requests
    )


class TokensReplica:
    """``@serve.batch`` by tokens."""

    def __init__(self, source: ModelSource, torch_threads: int) -> None:
        torch.set_num_threads(torch_threads)
        self._runner = _Runner(apart(partial(source.load, source.aliases().stable)))

    @serve.batch(
        max_batch_size=MAX_BATCH_TOKENS,
        batch_wait_timeout_s=MAX_BATCH_WAIT_S,
        batch_size_fn=_num_tokens,
    )
    async def infer(self, requests: list[InferRequest]) -> list[InferResponse]:
        """Answer requests together."""
        return await self._runner.run(requests)


class PaddedBatcher:
    """Static batching in process: so many sequences or a time-out, padded to the longest.

    Args:
        model: Of the benchmark task.
        batch_size: Sequences of a batch.
        wait_s: Longest wait for them.
    """

    def __init__(self, model: LoadedModel, batch_size: int = 8, wait_s: float = 0.005) -> None:
        self._runner = _Runner(model)
        self._batch_size, self._wait_s = batch_size, wait_s
        self._queue: asyncio.Queue[tuple[InferRequest, asyncio.Future[InferResponse]]] = (
            asyncio.Queue()
        )
        self._task = asyncio.create_task(self._serve())

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer a request of one sequence."""
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((request, future))
        return await future

    def stop(self) -> None:
        """End."""
        self._task.cancel()

    async def _serve(self) -> None:
        while True:
            batch = [await self._queue.get()]
            deadline = asyncio.get_running_loop().time() + self._wait_s
            while len(batch) < self._batch_size:
                try:
                    async with asyncio.timeout_at(deadline):
                        batch.append(await self._queue.get())
                except TimeoutError:
                    break
            longest = max(request.features.shape[0] for request, _ in batch)
            padded = [_pad(request, longest) for request, _ in batch]
            responses = await self._runner.run(padded)
            for (_, future), response in zip(batch, responses, strict=True):
                if not future.done():
                    future.set_result(response)


def _pad(request: InferRequest, length: int) -> InferRequest:
    features: NDArray[np.float32] = np.zeros((length, request.features.shape[1]), np.float32)
    features[: request.features.shape[0]] = request.features
    return InferRequest(
        request_id=request.request_id,
        tenant=request.tenant,
        task=request.task,
        features=features,
        cu_seqlens=np.array([0, length], dtype=np.int32),
        service_class=request.service_class,
        deadline_ms=request.deadline_ms,
    )
