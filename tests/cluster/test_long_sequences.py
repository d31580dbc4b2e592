"""A long sequence shares the engine with a stream: in chunks, exact, and in nobody's way."""

import asyncio

import numpy as np
import pytest
import torch

from benchmarks.workload import CHUNK_TOKENS, NUM_COLUMNS, TOKENS
from cluster.engine import Engine
from cluster.errors import InvalidRequestError
from cluster.loading import LoadedModel
from cluster.scheduler import Limits
from cluster.schemas import InferRequest, InferResponse, ServiceClass
from cluster.step import StepRunner
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch

LENGTH = 2 * CHUNK_TOKENS + 300


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(3)
    config = PRESETS["tiny"]
    core = MoETransformer(config, [TOKENS.name]).eval()
    runner = StepRunner(core, {TOKENS.name: TOKENS}, config.num_experts, config.num_layers)
    return LoadedModel(runner, "tokens-1")


def ask(lengths: tuple[int, ...], each: ServiceClass, name: str) -> InferRequest:
    rng = np.random.default_rng(sum(lengths))
    return InferRequest(
        request_id=name,
        tenant="t",
        task=TOKENS.name,
        features=rng.normal(size=(sum(lengths), NUM_COLUMNS)).astype(np.float32),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        service_class=each,
        deadline_ms=60_000.0,
    )


def test_long_and_short_sequences_of_one_request_come_back_in_order_and_exact(
    model: LoadedModel,
) -> None:
    lengths = (40, LENGTH, 70, CHUNK_TOKENS + 1, 9)
    request = ask(lengths, ServiceClass.BATCH, "mixed")
    batch = RaggedBatch(
        torch.from_numpy(request.features), torch.from_numpy(request.cu_seqlens), {}
    )
    with torch.inference_mode():
        expected = model.runner.model({TOKENS.name: batch}).outputs[TOKENS.name][0].numpy()

    async def run() -> None:
        engine = Engine(model, limits=Limits(max_step_ms=5.0))
        engine.start()
        long = asyncio.create_task(engine.infer(request))
        shorts: list[InferResponse] = []
        while not long.done():
            shorts.append(await engine.infer(ask((8, 8), ServiceClass.STREAM, f"s{len(shorts)}")))
        response = await long
        np.testing.assert_allclose(response.outputs, expected, rtol=1e-4, atol=1e-5)
        assert response.cu_seqlens.tolist() == list(range(len(lengths) + 1))
        tokens = sum(lengths) * model.runner.num_layers * PRESETS["tiny"].num_chosen
        assert response.tokens_per_expert.sum() == tokens
        assert len(shorts) > 1  # the stream went on meanwhile
        assert engine.status()["steps"] > len(shorts)
        await engine.stop()

    asyncio.run(run())


def test_a_sequence_beyond_the_limit_is_refused_with_what_can_be_done(model: LoadedModel) -> None:
    async def run() -> None:
        engine = Engine(model)
        with pytest.raises(InvalidRequestError, match="sequences of 1 to 131072 rows"):
            await engine.infer(ask((TOKENS.max_rows + 1,), ServiceClass.BATCH, "huge"))

    asyncio.run(run())
