"""Several versions in one engine: swap under load, rollback, canary, shadow."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from cluster.engine import Engine
from cluster.errors import CheckpointError, UnknownModelError
from cluster.loading import LoadedModel
from cluster.scheduler import Limits
from cluster.schemas import InferRequest
from cluster.versions import Aliases
from core_model.model import StepOutput

Load = Callable[[], LoadedModel]
Make = Callable[..., InferRequest]


def report_of(engine: Engine, version: str) -> Mapping[str, Any]:
    """What the engine says about a version."""
    (found,) = [each for each in engine.status()["models"] if each["model_version"] == version]
    report: Mapping[str, Any] = found
    return report


class Shifted(nn.Module):
    """Another version: every output moved by a constant."""

    def __init__(self, inner: Callable[..., StepOutput], shift: float) -> None:
        super().__init__()
        self.inner, self.shift = inner, shift

    def forward(self, batches: object) -> StepOutput:
        output = self.inner(batches)
        moved = {task: (rows + self.shift, cu) for task, (rows, cu) in output.outputs.items()}
        return output._replace(outputs=moved)


def loader(load_tiny: Load) -> Callable[[str], LoadedModel]:
    """Version tiny-N answers N - 1 more than tiny-1."""

    def load(version: str) -> LoadedModel:
        if version == "tiny-bad":
            message = "expected sha256 aa.., got bb.."
            raise CheckpointError(message)
        runner = load_tiny().runner
        shift = float(version.rpartition("-")[2]) - 1.0
        return LoadedModel(replace(runner, model=Shifted(runner.model, shift)), version)

    return load


def serve(
    model: LoadedModel, use: Callable[[Engine], Awaitable[None]], limits: Limits | None = None
) -> None:
    async def run() -> None:
        engine = Engine(model, limits=limits)
        engine.start()
        try:
            async with asyncio.timeout(60):
                await use(engine)
        finally:
            await engine.stop()

    asyncio.run(run())


def test_versions_swap_under_load_without_an_error(load_tiny: Load, make_request: Make) -> None:
    load = loader(load_tiny)

    async def use(engine: Engine) -> None:
        seen: list[tuple[str, float]] = []
        stop = asyncio.Event()

        async def ask() -> None:
            i = 0
            while not stop.is_set():
                i += 1
                response = await engine.infer(make_request(request_id=f"r{i}"))
                seen.append((response.model_version, float(response.outputs[0, 0])))

        async def some_answers() -> None:
            enough = len(seen) + 5
            while len(seen) < enough:  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.005)

        asking = asyncio.create_task(ask())
        await some_answers()
        await engine.follow(Aliases("tiny-2", previous="tiny-1"), load)
        await some_answers()
        await engine.follow(engine.aliases.rolled_back(), load)
        await some_answers()
        stop.set()
        await asking
        versions = [version for version, _ in seen]
        assert (
            versions
            == sorted(versions[: versions.index("tiny-2")]) + versions[versions.index("tiny-2") :]
        )
        assert versions[0] == versions[-1] == "tiny-1"
        assert "tiny-2" in versions
        values = {
            version: {value for v, value in seen if v == version} for version in set(versions)
        }
        (first,), (second,) = values["tiny-1"], values["tiny-2"]
        assert second == pytest.approx(first + 1.0, abs=1e-5)
        assert report_of(engine, "tiny-2")["ok"] == versions.count("tiny-2")

    serve(load_tiny(), use)


def test_a_version_that_cannot_be_loaded_changes_nothing(
    load_tiny: Load, make_request: Make
) -> None:
    async def use(engine: Engine) -> None:
        with pytest.raises(CheckpointError, match="sha256"):
            await engine.follow(Aliases("tiny-bad", previous="tiny-1"), loader(load_tiny))
        assert engine.aliases == Aliases("tiny-1")
        assert (await engine.infer(make_request())).model_version == "tiny-1"
        with pytest.raises(UnknownModelError):
            await engine.infer(make_request(model_version="tiny-bad"))

    serve(load_tiny(), use)


def test_canary_answers_its_share(load_tiny: Load, make_request: Make) -> None:
    async def use(engine: Engine) -> None:
        await engine.follow(
            Aliases("tiny-1", canary="tiny-2", canary_share=0.25), loader(load_tiny)
        )
        responses = await asyncio.gather(
            *(engine.infer(make_request(request_id=f"r{i}")) for i in range(200))
        )
        counts = Counter(response.model_version for response in responses)
        assert counts["tiny-2"] / 200 == pytest.approx(0.25, abs=0.1)
        asked = report_of(engine, "tiny-2")
        assert asked["ok"] == counts["tiny-2"]

    serve(load_tiny(), use)


def test_shadow_is_compared_and_never_answers(load_tiny: Load, make_request: Make) -> None:
    async def use(engine: Engine) -> None:
        aliases = Aliases("tiny-1", shadow="tiny-3", shadow_share=1.0)
        await engine.follow(aliases, loader(load_tiny))
        for i in range(20):
            response = await engine.infer(make_request((2, 3), request_id=f"r{i}"))
            assert response.model_version == "tiny-1"
        while report_of(engine, "tiny-3")["shadowed"] < 40:  # noqa: ASYNC110 - a count
            await asyncio.sleep(0.005)
        report = report_of(engine, "tiny-3")
        assert (report["shadowed"], report["disagreed"], report["ok"]) == (40, 40, 0)

    serve(load_tiny(), use, Limits(spare_share=0.5, spare_queue=20))


def test_versions_that_no_alias_names_are_let_go(load_tiny: Load, make_request: Make) -> None:
    async def use(engine: Engine) -> None:
        load = loader(load_tiny)
        await engine.follow(Aliases("tiny-2", previous="tiny-1"), load)
        await engine.follow(Aliases("tiny-3", previous="tiny-2"), load)
        assert sorted(each["model_version"] for each in engine.status()["models"]) == [
            "tiny-2",
            "tiny-3",
        ]
        with pytest.raises(UnknownModelError):
            await engine.infer(make_request(model_version="tiny-1"))

    serve(load_tiny(), use)


def test_a_request_keeps_the_version_that_is_let_go_before_its_answer_begins(
    load_tiny: Load, make_request: Make
) -> None:
    async def use(engine: Engine) -> None:
        load = loader(load_tiny)
        await engine.follow(Aliases("tiny-2", previous="tiny-1"), load)
        asked = asyncio.create_task(engine.infer(make_request()))
        await asyncio.create_task(engine.follow(Aliases("tiny-1"), load))  # begins after it
        assert (await asked).model_version == "tiny-2"

    serve(load_tiny(), use)
