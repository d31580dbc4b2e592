"""A small but real model over two tasks, and requests for it."""

import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster import platform
from cluster.loading import LoadedModel
from cluster.schemas import InferRequest, ServiceClass
from cluster.step import StepRunner
from core_model.model import StepOutput
from core_model.packing import RaggedBatch, concat_cu_seqlens, segment_ids
from core_model.tasks import ExtraSpec, TaskSpec

NUM_EXPERTS = 4
NUM_LAYERS = 2
MakeRequest = Callable[..., InferRequest]


def _spec(name: str, d_task: int, extra: ExtraSpec) -> TaskSpec:
    return TaskSpec(
        name=name,
        d_task=d_task,
        outputs=("low", "high"),
        build_adapter=lambda _: nn.Identity(),
        build_head=lambda _: nn.Identity(),
        count_tokens=lambda rows: rows.astype(np.int64),
        max_rows=40,
        max_tokens=40,
        service_class="stream",
        deadline_ms=1000.0,
        extras={"context": extra},
    )


TASKS = {
    "cards": _spec("cards", 3, ExtraSpec(width=2)),
    "gauges": _spec("gauges", 5, ExtraSpec(width=1, dtype="float64", per="row")),
}


class TinyModel(nn.Module):
    """One token per row; a sequence's output rows depend on all of its rows and on nothing else.

    "cards" answers one row per sequence, "gauges" one per input row.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.inputs = nn.ModuleDict({"cards": nn.Linear(5, 8), "gauges": nn.Linear(6, 8)})
        self.routers = nn.ModuleList(nn.Linear(8, NUM_EXPERTS) for _ in range(NUM_LAYERS))
        self.head = nn.Linear(8, 2)

    def forward(self, batches: Mapping[str, RaggedBatch]) -> StepOutput:
        outputs, tokens, offsets = {}, [], []
        for task, batch in batches.items():
            if bool((batch.features == 666.0).any()):
                raise RuntimeError("unlucky number")
            segment = segment_ids(batch.cu_seqlens, batch.features.shape[0])
            context = batch.extras["context"].float()
            context = context[segment] if task == "cards" else context
            token = torch.tanh(self.inputs[task](torch.cat([batch.features, context], dim=1)))
            pooled = token.new_zeros(batch.num_sequences, 8).index_add_(0, segment, token)
            answer = pooled if task == "cards" else pooled[segment] + token
            rows = torch.arange(batch.num_sequences + 1, dtype=torch.int32)
            outputs[task] = (self.head(answer), rows if task == "cards" else batch.cu_seqlens)
            tokens.append(token)
            offsets.append(batch.cu_seqlens)
        joined = torch.cat(tokens)
        experts = torch.stack([router(joined).topk(2).indices for router in self.routers])
        return StepOutput(outputs, experts.int(), concat_cu_seqlens(offsets))


def load_tiny() -> LoadedModel:
    return LoadedModel(StepRunner(TinyModel().eval(), TASKS, NUM_EXPERTS), "tiny-1")


def build_request(
    lengths: tuple[int, ...] = (3, 1, 2),
    task: str = "cards",
    *,
    seed: int = 0,
    **fields: Any,  # noqa: ANN401 - passed on
) -> InferRequest:
    """A seeded request of that task with sequences of those lengths."""
    rng = np.random.default_rng(seed)
    spec = TASKS[task]
    extra = spec.extras["context"]
    count = len(lengths) if extra.per == "sequence" else sum(lengths)
    return InferRequest(
        **{
            "request_id": f"r{seed}",
            "tenant": "t",
            "task": task,
            "features": rng.normal(size=(sum(lengths), spec.d_task)).astype(np.float32),
            "cu_seqlens": np.cumsum([0, *lengths], dtype=np.int32),
            "extras": {"context": rng.normal(size=(count, extra.width)).astype(extra.dtype)},
            "service_class": ServiceClass.STREAM,
            "deadline_ms": 5000.0,
            **fields,
        }
    )


@pytest.fixture(name="load_tiny")
def _load_tiny() -> Callable[[], LoadedModel]:
    return load_tiny


@pytest.fixture
def make_request() -> MakeRequest:
    return build_request


@pytest.fixture(scope="module")
def platform_url() -> Iterator[str]:
    """The tiny model behind Serve, with an HTTP door; gone before another module starts Ray."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    platform.prepare_environment()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own imports warn
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[TinyModel.__module__])
        running = platform.start(platform.PlatformConfig(port=port), load=load_tiny)
    assert running.url is not None
    yield running.url
    running.stop()
