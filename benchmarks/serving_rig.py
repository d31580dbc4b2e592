"""What the serving benchmarks share: the model, the deployments to compare, progress."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from ray import serve

from benchmarks.serving_peers import FifoReplica, TokensReplica
from benchmarks.workload import TOKENS
from cluster.client import Client
from cluster.deployments import CoreReplica
from cluster.handle import HandleClient
from cluster.loading import LoadedModel, ModelSource, OneModel
from cluster.retry import RetryPolicy
from cluster.step import StepRunner
from core_model.builtin_tasks import FRAUD
from core_model.config import PRESETS
from core_model.graphs import captured_blocks
from core_model.model import MoETransformer


class Doors(NamedTuple):
    """Clients of what serves the stream and what serves the batch; often the same."""

    stream: Client
    batch: Client


Policy = Callable[[], AbstractContextManager[Doors]]


def make_model(preset: str, device: str, version: str = "random-1") -> LoadedModel:
    """Return a model of random weights over the stream's and the benchmark's task."""
    torch.manual_seed(0)
    config, tasks = PRESETS[preset], {FRAUD.name: FRAUD, TOKENS.name: TOKENS}
    with torch.device(device):  # billions of numbers are drawn where they are needed
        model = MoETransformer(config, list(tasks)).eval().requires_grad_(requires_grad=False)
    if device != "cpu":
        model = model.to(device).narrow_blocks(torch.bfloat16)
        model.graphs = captured_blocks(model)
    runner = StepRunner(model, tasks, config.num_experts, config.num_layers, device)
    return LoadedModel(runner, version)


@contextmanager
def deployed(
    replica: type, source: ModelSource, *, replicas: int = 1, gpus: float, name: str = "peer"
) -> Iterator[Client]:
    """Serve a replica class as an application and yield a client of it that never retries."""
    deployment: Any = serve.deployment(
        name=name,
        num_replicas=replicas,
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        health_check_timeout_s=600.0,
    )(replica)
    handle: Any = serve.run(deployment.bind(source, 1), name=name, route_prefix=None)
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    try:
        yield HandleClient(handle, RetryPolicy(first_pause_s=1e9, longest_pause_s=1e9))
    finally:
        serve.delete(name)


@dataclass(frozen=True, slots=True)
class Rig:
    """One run of the command.

    Args:
        preset: Of the model.
        device: Where it runs.
        seconds: Of one measurement.
        rounds: Of alternating policies.
    """

    preset: str
    device: str
    seconds: float
    rounds: int

    @property
    def replicas(self) -> int:
        """Replicas of the shared model: one thread each, one for each core or for the GPU."""
        return len(os.sched_getaffinity(0)) if self.device == "cpu" else 1

    @property
    def gpus(self) -> float:
        """GPUs of the shared model."""
        return 0.0 if self.device == "cpu" else 1.0

    @property
    def source(self) -> OneModel:
        """Where replicas get the model."""
        return OneModel(partial(make_model, self.preset, self.device))

    def make_model(self) -> LoadedModel:
        """Return a model for this process, which computes with one thread as a replica does."""
        torch.set_num_threads(1)
        return make_model(self.preset, self.device)

    def say(self, text: str) -> None:
        """Tell how far the run is."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def policies(self) -> dict[str, Policy]:
        """Return what may serve both loads, by name."""
        return {
            "fifo": partial(self.one, FifoReplica),
            "serve_batch": partial(self.one, TokensReplica),
            "two_deployments": self.two,
            "ours": self.ours,
        }

    @contextmanager
    def one(self, replica: type) -> Iterator[Doors]:
        """One deployment for both."""
        with deployed(replica, self.source, replicas=self.replicas, gpus=self.gpus) as client:
            yield Doors(client, client)

    @contextmanager
    def ours(self) -> Iterator[Doors]:
        """The shared deployment."""
        with self.one(CoreReplica) as doors:
            yield doors

    @contextmanager
    def two(self) -> Iterator[Doors]:
        """A deployment each, sharing the machine: half of the cores or of the GPU each."""
        replicas, gpus = max(1, self.replicas // 2), self.gpus / 2
        half = partial(deployed, FifoReplica, self.source, replicas=replicas, gpus=gpus)
        with half(name="s") as stream, half(name="b") as batch:
            yield Doors(stream, batch)
