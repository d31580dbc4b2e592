"""A small but real model over two tasks, requests for it, and an HTTP API in this process."""

import asyncio
import json
import socket
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from torch import nn

from cluster import platform
from cluster.api import ApiSettings, build_api
from cluster.backend import Backend
from cluster.caller import Rate, Role
from cluster.keys import KeyFile, create_key
from cluster.loading import LoadedModel, OneModel
from cluster.metrics import METRICS
from cluster.schemas import InferRequest, InferResponse, ServiceClass, Timings
from cluster.step import StepRunner
from cluster.versions import VersionRecord
from core_model.builtin_tasks import FRAUD
from core_model.model import StepOutput
from core_model.packing import RaggedBatch, concat_cu_seqlens, segment_ids
from core_model.tasks import ExtraSpec, TaskSpec

KEY_FILES: dict[str, Path] = {}  # token -> its file
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
    return LoadedModel(StepRunner(TinyModel().eval(), TASKS, NUM_EXPERTS, NUM_LAYERS), "tiny-1")


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
def platform_key(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key of tenant t for the platform of ``platform_url``."""
    rate = Rate(requests_per_s=1000.0, rows_per_s=1e9)
    path = tmp_path_factory.mktemp("platform") / "keys.json"
    token = create_key(path, "t", roles=list(Role), rate=rate)
    KEY_FILES[token] = path
    return token


@pytest.fixture(scope="module")
def platform_url(platform_key: str) -> Iterator[str]:
    """The tiny model behind Serve, with an HTTP door; gone before another module starts Ray."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    platform.prepare_environment()
    config = platform.PlatformConfig(port=port, api_keys=KEY_FILES[platform_key])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own imports warn
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[TinyModel.__module__])
        running = platform.start(config, source=OneModel(load_tiny))
    assert running.url is not None
    yield running.url
    running.stop()


class FakeClient:
    """Answers at once with each sequence's row count, or as it is told."""

    def __init__(self) -> None:
        self.requests: list[InferRequest] = []
        self.error: Exception | None = None
        self.asked = asyncio.Event()
        self.gate: asyncio.Event | None = None

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        num_outputs = len(FRAUD.outputs) if request.task == "fraud" else 2
        lengths = np.diff(request.cu_seqlens).astype(np.float32)
        return InferResponse(
            request_id=request.request_id,
            outputs=np.repeat(lengths[:, None], num_outputs, axis=1),
            cu_seqlens=np.arange(request.num_sequences + 1, dtype=np.int32),
            status=np.zeros(request.num_sequences, dtype=np.uint8),
            model_version="fake-1",
            timings=Timings(queued_ms=1.0, compute_ms=2.0),
            tokens_per_expert=np.zeros((1, 4), dtype=np.int64),
        )


class ListRecorder:
    """Keeps what is recorded, and checks that labels are those of the metric."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Mapping[str, str]]] = []

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        assert set(labels) == set(METRICS[name].labels)
        assert value >= 0
        self.found.append((name, labels))

    def labels_of(self, name: str) -> list[Mapping[str, str]]:
        return [labels for found, labels in self.found if found == name]


@dataclass(frozen=True)
class Answer:
    """What came back over ASGI."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever it is
        return json.loads(self.body)


class Door:
    """An API in this process: asks it over ASGI, without a socket."""

    def __init__(self, keys: KeyFile | None = None, **settings: Any) -> None:  # noqa: ANN401 - passed on
        self.client = FakeClient()
        self.recorder = ListRecorder()
        self.report: dict[str, Any] = {
            "model_version": "fake-1",
            "models": [
                {
                    "model_version": "fake-1",
                    "aliases": ["stable"],
                    "tasks": ["cards", "fraud"],
                    "device": "cpu",
                    **VersionRecord().report(),
                }
            ],
        }
        self.broken: Exception | None = None
        backend = Backend(self.client, self.status, self.page, self.recorder)
        tasks = {**TASKS, "fraud": FRAUD}
        self.api = build_api(backend, tasks, keys, ApiSettings(**settings))

    async def status(self) -> Mapping[str, Any]:
        if self.broken is not None:
            raise self.broken
        return self.report

    async def page(self) -> bytes:
        return b"ray_trimoe_http_ms_count 1\n"

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | AsyncIterator[bytes] = b"",
        kind: str = "application/json",
        raw_headers: Sequence[tuple[bytes, bytes]] = (),
        **headers: str,
    ) -> Answer:
        """Ask; headers are written with ``_`` for ``-``, ``raw_headers`` stand as they are."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body:
            given = {name for name, _ in raw_headers}
            named |= {} if b"content-type" in given else {"content-type": kind}
        raw_path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(raw_path),
            "raw_path": raw_path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in named.items()]
            + list(raw_headers),
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        chunks = body if isinstance(body, AsyncIterator) else _one(body)
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            async for chunk in chunks:
                return {"type": "http.request", "body": chunk, "more_body": True}
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await self.api(scope, receive, send)
        start, *rest = sent
        return Answer(
            start["status"],
            {name.decode(): value.decode() for name, value in start["headers"]},
            b"".join(each.get("body", b"") for each in rest),
        )


async def _one(body: bytes) -> AsyncIterator[bytes]:
    yield body


@dataclass(frozen=True)
class Keys:
    """A file of keys and the headers that open with them."""

    file: KeyFile
    path: Path
    tokens: Mapping[str, str]

    def __getitem__(self, tenant: str) -> str:
        return f"Bearer {self.tokens[tenant]}"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Of alpha (all roles), beta (the task cards), gamma (a low rate), delta (infer alone)."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    slow = Rate(requests_per_s=1.0, rows_per_s=10.0)
    tokens = {
        "alpha": create_key(path, "alpha", roles=list(Role)),
        "beta": create_key(path, "beta", tasks=["cards"]),
        "gamma": create_key(path, "gamma", rate=slow),
        "delta": create_key(path, "delta", roles=[Role.INFER]),
    }
    return Keys(KeyFile(path), path, tokens)


@pytest.fixture
def make_door() -> Callable[..., Door]:
    """Builds a door; ``keys`` is a ``KeyFile``, further words are those of ``ApiSettings``."""
    return Door


@pytest.fixture
def fake_client() -> FakeClient:
    return FakeClient()
