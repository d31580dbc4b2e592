"""What the engine records: every metric it names is in the list, with the labels the list says."""

import asyncio
from collections.abc import Callable, Mapping

import pytest

from cluster.engine import Engine
from cluster.errors import UnavailableError
from cluster.loading import LoadedModel
from cluster.metrics import METRICS, Kind
from cluster.schemas import InferRequest, ServiceClass
from cluster.versions import Aliases

Load = Callable[[], LoadedModel]
Make = Callable[..., InferRequest]


class StrictRecorder:
    """Takes only what Ray would take."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        metric = METRICS[name]
        assert set(labels) == set(metric.labels)
        assert all(isinstance(label, str) for label in labels.values())
        if metric.kind is Kind.COUNTER:
            assert value > 0
        self.sums[name] = self.sums.get(name, 0.0) + value


def test_every_measurement_is_one_that_the_list_knows(load_tiny: Load, make_request: Make) -> None:
    recorder = StrictRecorder()

    async def run() -> None:
        engine = Engine(load_tiny(), recorder=recorder)
        engine.start()
        await engine.follow(
            Aliases("tiny-1", shadow="tiny-2"), lambda _: LoadedModel(load_tiny().runner, "tiny-2")
        )
        for i in range(5):
            await engine.infer(make_request(request_id=f"r{i}"))
        with pytest.raises(UnavailableError):
            await engine.infer(make_request(request_id="late", deadline_ms=1e-6))
        while engine.status()["models"][1]["shadowed"] < 15:  # noqa: ASYNC110 - a count
            await asyncio.sleep(0.005)
        await engine.stop()

    asyncio.run(run())
    assert recorder.sums["trimoe_requests_total"] >= 5 + 1 + 5  # asked, refused, shadowed
    assert recorder.sums["trimoe_deadline_misses_total"] == 1
    assert recorder.sums["trimoe_shadow_sequences_total"] == 15
    assert "trimoe_shadow_disagreement_total" not in recorder.sums
    assert recorder.sums["trimoe_padding_tokens"] == 0


def test_the_composition_says_of_what_steps_were_made(load_tiny: Load, make_request: Make) -> None:
    async def run() -> None:
        engine = Engine(load_tiny())
        engine.start()
        cards = make_request(request_id="a", lengths=(3, 1))
        gauges = make_request((5,), "gauges", request_id="b", service_class=ServiceClass.BATCH)
        await asyncio.gather(engine.infer(cards), engine.infer(gauges))
        await engine.infer(make_request(request_id="c", lengths=(2,)))
        status = engine.status()
        await engine.stop()
        assert (status["steps"], status["mixed_steps"]) == (2, 1)
        assert status["step_tokens"] == {"cards": {"stream": 6}, "gauges": {"batch": 5}}

    asyncio.run(run())


class BrokenRecorder:
    """Fails as a recorder must not."""

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        if name == "trimoe_step_ms":
            raise ValueError(name, value, labels)


def test_a_step_that_cannot_be_finished_fails_its_requests_instead_of_losing_them(
    load_tiny: Load, make_request: Make
) -> None:
    async def run() -> None:
        engine = Engine(load_tiny(), recorder=BrokenRecorder())
        engine.start()
        with pytest.raises(UnavailableError, match="its step failed with ValueError"):
            await engine.infer(make_request())
        await engine.stop()

    asyncio.run(run())
