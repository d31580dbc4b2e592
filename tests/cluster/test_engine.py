"""The engine answers many ragged requests in shared steps exactly as it would one by one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.client import infer_blocking
from cluster.engine import Engine
from cluster.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
)
from cluster.loading import LoadedModel
from cluster.local import LocalClient
from cluster.scheduler import Limits
from cluster.schemas import InferRequest, InferResponse, SequenceStatus, ServiceClass
from cluster.step import StepRunner

Load = Callable[[], LoadedModel]
Make = Callable[..., InferRequest]


def serve(model: LoadedModel, use: Callable[[Engine], Awaitable[None]]) -> None:
    """Run a scenario against a started engine."""

    async def run() -> None:
        engine = Engine(model)
        engine.start()
        try:
            await use(engine)
        finally:
            await engine.stop()

    asyncio.run(run())


def one_by_one(model: LoadedModel, request: InferRequest) -> Sequence[InferResponse]:
    """Answer every sequence of a request in a request of its own."""
    responses = []
    with LocalClient(model) as client:
        for i in range(request.num_sequences):
            rows = slice(*request.cu_seqlens[i : i + 2].tolist())
            per_row = model.runner.tasks[request.task].extras["context"].per == "row"
            context = request.extras["context"][rows if per_row else slice(i, i + 1)]
            single = replace(
                request,
                features=request.features[rows],
                cu_seqlens=np.array([0, rows.stop - rows.start], dtype=np.int32),
                extras={"context": context},
            )
            responses.append(infer_blocking(client, single))
    return responses


def test_shared_ragged_steps_answer_as_one_by_one(load_tiny: Load, make_request: Make) -> None:
    model = load_tiny()
    rng = np.random.default_rng(11)
    requests = [
        make_request(
            tuple(rng.integers(1, 20, size=rng.integers(1, 9))),
            task,
            seed=seed,
            service_class=service_class,
        )
        for seed, (task, service_class) in enumerate(
            [("cards", ServiceClass.STREAM), ("gauges", ServiceClass.BATCH)] * 6
        )
    ]

    alone = [one_by_one(model, request) for request in requests]

    async def use(engine: Engine) -> None:
        responses = await asyncio.gather(*map(engine.infer, requests))
        assert engine.status()["steps"] < len(requests)
        for request, response, singles in zip(requests, responses, alone, strict=True):
            expected = np.concatenate([each.outputs for each in singles])
            np.testing.assert_allclose(response.outputs, expected, rtol=1e-5, atol=1e-6)
            per_row = request.task == "gauges"
            cu_rows = request.cu_seqlens if per_row else np.arange(request.num_sequences + 1)
            np.testing.assert_array_equal(response.cu_seqlens, cu_rows)
            counts = np.sum([each.tokens_per_expert for each in singles], axis=0)
            np.testing.assert_array_equal(response.tokens_per_expert, counts)
            assert counts.sum() == 2 * 2 * request.features.shape[0]  # two layers, top-2
            assert response.request_id == request.request_id
            assert not response.status.any()

    serve(model, use)


def test_a_closed_client_says_so(load_tiny: Load, make_request: Make) -> None:
    with LocalClient(load_tiny()) as client:
        infer_blocking(client, make_request())
    with pytest.raises(UnavailableError, match="r0: expected an open client"):
        infer_blocking(client, make_request(request_id="r0"))


def test_request_spread_over_steps_comes_back_whole(load_tiny: Load, make_request: Make) -> None:
    model = load_tiny()
    request = make_request(tuple([7] * 40), deadline_ms=60_000.0, service_class=ServiceClass.BATCH)
    with LocalClient(model) as client:
        whole = infer_blocking(client, request)
    with LocalClient(model, Limits(max_step_ms=0.01)) as client:
        spread = infer_blocking(client, request)
        num_steps = client._engine.status()["steps"]
    assert num_steps > 1
    np.testing.assert_allclose(spread.outputs, whole.outputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(spread.tokens_per_expert, whole.tokens_per_expert)


def test_only_the_sequence_with_a_non_finite_answer_is_marked(
    load_tiny: Load, make_request: Make
) -> None:
    request = make_request((2, 3, 1))
    request.features[3, 1] = np.nan
    with LocalClient(load_tiny()) as client:
        response = infer_blocking(client, request)
    ok, broken = SequenceStatus.OK, SequenceStatus.NON_FINITE
    assert response.status.tolist() == [ok, broken, ok]


def test_request_that_breaks_the_model_does_not_break_its_neighbours(
    load_tiny: Load, make_request: Make
) -> None:
    good, bad = make_request(seed=1), make_request(seed=2)
    bad.features[0, 0] = 666.0

    async def use(engine: Engine) -> None:
        answers = await asyncio.gather(
            engine.infer(good), engine.infer(bad), engine.infer(good), return_exceptions=True
        )
        assert isinstance(answers[0], InferResponse)
        assert isinstance(answers[1], UnavailableError)
        assert "RuntimeError: unlucky number" in str(answers[1])
        assert isinstance(answers[2], InferResponse)

    serve(load_tiny(), use)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "tarot"}, "expected a task among ['cards', 'gauges'], got 'tarot'"),
        ({"features": np.zeros((6, 4), np.float32)}, "expected features [R, 3], got [6, 4]"),
        ({"extras": {}}, "expected extras ['context'], got []"),
        (
            {"extras": {"context": np.zeros((3, 2), np.float64)}},
            "expected extras['context'] float32 [3, 2], got float64 [3, 2]",
        ),
        (
            {"extras": {"context": np.zeros((3, 2), np.float32), "more": np.zeros(3)}},
            "expected extras ['context'], got ['context', 'more']",
        ),
        (
            {"cu_seqlens": np.array([0, 3, 3, 6], np.int32)},
            "expected sequences of 1 to 40 rows, got 3 of 0 to 3 rows",
        ),
    ],
)
def test_request_that_does_not_fit_its_task_is_refused(
    load_tiny: Load, make_request: Make, change: dict[str, object], message: str
) -> None:
    request = replace(make_request(), **change)  # type: ignore[arg-type]
    with LocalClient(load_tiny()) as client, pytest.raises(InvalidRequestError) as caught:
        infer_blocking(client, request)
    assert str(caught.value) == f"request r0: {message}"


def test_sequence_above_the_row_limit_is_refused(load_tiny: Load, make_request: Make) -> None:
    with LocalClient(load_tiny()) as client, pytest.raises(InvalidRequestError, match="1 to 40"):
        infer_blocking(client, make_request((41,)))


def test_version_is_an_alias_or_exact(load_tiny: Load, make_request: Make) -> None:
    with LocalClient(load_tiny()) as client:
        for version in ("stable", "tiny-1"):
            assert infer_blocking(client, make_request(model_version=version)).model_version == (
                "tiny-1"
            )
        with pytest.raises(UnknownModelError, match="got 'tiny-2'"):
            infer_blocking(client, make_request(model_version="tiny-2"))


def test_abandoned_request_is_not_computed(load_tiny: Load, make_request: Make) -> None:
    async def use(engine: Engine) -> None:
        abandoned = asyncio.create_task(engine.infer(make_request()))
        await asyncio.sleep(0)
        abandoned.cancel()
        await asyncio.sleep(0.05)
        assert engine.status()["steps"] == 0

    serve(load_tiny(), use)


class SlowModel(torch.nn.Module):
    """The tiny model on a slow device."""

    def __init__(self, inner: StepRunner, release: "asyncio.Event") -> None:
        super().__init__()
        self.inner, self.release = inner.model, release
        self.num_calls = 0

    def forward(self, batches: object) -> object:
        self.num_calls += 1
        while not self.release.is_set():
            pass
        return self.inner(batches)  # type: ignore[arg-type]


def test_stall_shows_and_requests_that_wait_expire_or_fail_at_stop(
    load_tiny: Load, make_request: Make
) -> None:
    async def run() -> None:
        model, release = load_tiny(), asyncio.Event()
        slow = SlowModel(model.runner, release)
        engine = Engine(LoadedModel(replace(model.runner, model=slow), "v"))
        assert engine.stalled_s == np.inf  # not started
        engine.start()
        assert engine.stalled_s == 0.0
        first = asyncio.create_task(engine.infer(make_request()))
        await asyncio.sleep(0.02)
        late = asyncio.create_task(engine.infer(make_request(seed=1, deadline_ms=30.0)))
        await asyncio.sleep(0.05)
        assert engine.stalled_s > 0.04
        release.set()
        assert isinstance(await first, InferResponse)
        with pytest.raises(DeadlineExceededError, match="0 ms left"):
            await late
        release.clear()
        running = asyncio.create_task(engine.infer(make_request()))
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(engine.infer(make_request(seed=1)))
        await asyncio.sleep(0.02)
        asyncio.get_running_loop().call_later(0.05, release.set)
        await engine.stop()
        assert isinstance(await running, InferResponse)
        with pytest.raises(UnavailableError, match="shutting down"):
            await waiting
        assert engine.stalled_s == np.inf

    asyncio.run(run())


def test_warm_up_teaches_the_cost_model(load_tiny: Load) -> None:
    async def use(engine: Engine) -> None:
        await engine.warm_up()
        assert engine.status()["steps"] >= 8

    serve(load_tiny(), use)
