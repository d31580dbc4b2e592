"""Windows in pieces beside a stream: exact, mixed with it in the same steps, in nobody's way."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.workload import NUM_COLUMNS, TOKENS
from cluster.admission import admit
from cluster.engine import Engine
from cluster.loading import LoadedModel
from cluster.scheduler import Job, Limits, Slice
from cluster.schemas import InferRequest, InferResponse, ServiceClass
from cluster.step import StepRunner
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.volume import VolumeAdapter
from core_model.volume_tasks import CHANNELS, NUM_CASE, ORGANS_TASK, PATCH_VOXELS, WindowGrid
from core_model.voxels import VoxelHead

GRID = WindowGrid(2, 1, 6)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(3)
    config = PRESETS["tiny"]
    core = MoETransformer(config, ["organs", "tokens"])
    core.adapters["organs"] = VolumeAdapter(config, GRID, CHANNELS)
    core.heads["organs"] = VoxelHead(config, GRID, CHANNELS, 3)
    tasks = {"organs": ORGANS_TASK, "tokens": TOKENS}
    return LoadedModel(
        StepRunner(core.eval(), tasks, config.num_experts, config.num_layers), "both-1"
    )


def windows(*kept: int, name: str = "case") -> InferRequest:
    rng = np.random.default_rng(sum(kept))
    rows = [NUM_CASE + num for num in kept]
    case = GRID.num_patches + np.arange(NUM_CASE)
    cells = np.concatenate([np.concatenate([case, np.arange(num)]) for num in kept])
    return InferRequest(
        request_id=name,
        tenant="imaging",
        task="organs",
        features=rng.normal(0, 300, (sum(rows), PATCH_VOXELS)).astype(np.float32),
        cu_seqlens=np.cumsum([0, *rows], dtype=np.int32),
        extras={
            "cell": cells.astype(np.int32)[:, None],
            "place": rng.normal(0, 100, (sum(rows), 3)).astype(np.float32),
        },
        service_class=ServiceClass.BATCH,
        deadline_ms=60_000.0,
    )


def stream(name: str, columns: int = NUM_COLUMNS) -> InferRequest:
    return InferRequest(
        request_id=name,
        tenant="t",
        task="tokens",
        features=np.ones((8, columns), dtype=np.float32),
        cu_seqlens=np.array([0, 3, 8], dtype=np.int32),
        service_class=ServiceClass.STREAM,
        deadline_ms=60_000.0,
    )


def whole(
    loaded: LoadedModel, request: InferRequest
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    extras = {name: torch.from_numpy(array) for name, array in request.extras.items()}
    features, offsets = torch.from_numpy(request.features), torch.from_numpy(request.cu_seqlens)
    with torch.inference_mode():
        found = loaded.runner.model({"organs": RaggedBatch(features, offsets, extras)})
    return found.outputs["organs"][0].numpy()


def job_of(loaded: LoadedModel, request: InferRequest) -> Job:
    work = admit(replace(request), loaded.runner.tasks, loaded.runner.num_layers)
    future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
    return Job(request, work, 0.0, future, loaded)


def test_windows_of_a_request_come_back_in_order_and_as_if_whole(loaded: LoadedModel) -> None:
    request = windows(12, 3, 7, 1, 9)

    async def run() -> None:
        engine = Engine(loaded, limits=Limits(max_step_ms=0.1))
        engine.start()
        case = asyncio.create_task(engine.infer(request))
        num_answered = 0
        while not case.done():
            await engine.infer(stream(f"s{num_answered}"))
            num_answered += 1
        response, status = await case, engine.status()
        await engine.stop()
        expected = whole(loaded, request)
        assert response.outputs.shape == expected.shape
        assert np.mean(response.outputs == expected) > 0.99  # ties, and the last of eight bits
        num_tokens = int(request.cu_seqlens[-1])
        assert response.tokens_per_expert.sum() == num_tokens * loaded.runner.num_layers * 2
        assert num_answered > 1  # the stream went on meanwhile
        assert status["steps"] > num_answered
        assert status["mixed_steps"] > 1
        assert status["step_tokens"] == {
            "organs": {"batch": num_tokens},
            "tokens": {"stream": 8 * num_answered},
        }

    asyncio.run(run())


def test_a_step_that_fails_beside_a_window_does_not_run_its_pieces_twice(
    loaded: LoadedModel,
) -> None:
    async def run() -> None:
        request, runner = windows(5), loaded.runner
        window = job_of(loaded, request)
        misfit = stream("misfit", columns=NUM_COLUMNS + 1)  # its adapter raises
        bad = job_of(loaded, stream("misfit"))
        bad.request = misfit
        last = window.work.num_pieces
        middle = last // 2
        pieces = Slice(window, 0, middle)
        with pytest.raises(RuntimeError):
            runner.run([Slice(bad, 0, bad.work.num_pieces), pieces])
        assert runner.run([pieces])[pieces] == []  # as the engine does, alone
        rest = Slice(window, middle, last)
        (answer,) = runner.run([rest])[rest]
        assert np.mean(answer.outputs == whole(loaded, request)) > 0.99

    asyncio.run(run())
