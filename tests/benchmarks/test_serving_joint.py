"""Versions of a joint model change under three loads: what is counted, and a short run."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving_joint_changes import (
    ONE,
    TWO,
    Plan,
    copies,
    find_joint,
    measure,
    stream_p99_ms,
)
from benchmarks.serving_joint_ledger import (
    NON_FINITE,
    Entry,
    Ledger,
    Phase,
    by_phase,
    canary_shares,
    followed_s,
    on_trial,
)
from benchmarks.serving_load import Outcome, fraud_requests
from cluster.errors import ConfigurationError, QueueFullError
from cluster.schemas import InferRequest, InferResponse, Timings
from cluster.versions import STABLE, Aliases
from core_model.checkpoint import save_checkpoint
from core_model.config import PRESETS
from core_model.model import MoETransformer
from tests.system.test_demo_all import write_model

ANSWER = Entry("r-0", "fraud", STABLE, "v-1", "", asked_s=1.0, ended_s=1.5)
FAILURE = replace(ANSWER, version="", error="QueueFullError")


class Scripted:
    """Answers, answers without a finite number, and refuses, in turn."""

    def __init__(self) -> None:
        self.num = 0

    async def infer(self, request: InferRequest) -> InferResponse:
        self.num += 1
        if self.num == 3:
            raise QueueFullError
        status = np.full(request.num_sequences, self.num - 1, np.uint8)
        outputs = np.zeros((request.num_sequences, 1), np.float32)
        offsets = np.arange(request.num_sequences + 1, dtype=np.int32)
        routed = np.zeros((1, 1), np.int64)
        return InferResponse(
            request.request_id, outputs, offsets, status, "v-1", Timings(0.0, 0.0), routed
        )


def test_every_end_of_a_request_is_booked_once() -> None:
    times = iter(np.arange(10.0).tolist())
    ledger, requests = Ledger(Scripted(), lambda: next(times)), fraud_requests(2, 1000.0)
    for _ in range(2):
        asyncio.run(ledger.infer(next(requests)))
    with pytest.raises(QueueFullError):
        asyncio.run(ledger.infer(next(requests)))
    booked = [(each.version, each.error) for each in ledger.entries]
    assert booked == [("v-1", ""), ("v-1", NON_FINITE), ("", "QueueFullError")]
    assert [(each.asked_s, each.ended_s) for each in ledger.entries] == [(1, 2), (3, 4), (5, 6)]
    assert {(each.task, each.wanted) for each in ledger.entries} == {("fraud", STABLE)}


def test_an_end_counts_in_the_phase_in_which_it_came() -> None:
    entries = [
        replace(ANSWER, ended_s=-0.1),  # before the first phase
        replace(ANSWER, asked_s=9.9, ended_s=10.0, version="v-2"),
        replace(FAILURE, ended_s=12.0),
        replace(ANSWER, task="organs", ended_s=99.0),  # long after the last one has begun
    ]
    found = by_phase(entries, [Phase("a", 0.0), Phase("b", 10.0)], ["fraud", "organs"])
    nothing = {"answers": 0, "errors": {}, "versions": {}}
    one, other = ({"answers": 1, "errors": {}, "versions": {name: 1}} for name in ("v-1", "v-2"))
    assert found["a"] == {"fraud": one, "organs": nothing}
    assert found["b"] == {"fraud": {**other, "errors": {"QueueFullError": 1}}, "organs": one}


def test_only_what_left_the_version_open_is_on_trial() -> None:
    open_to_it = [replace(ANSWER, version=f"v-{1 + (i == 0)}") for i in range(4)]
    others = [
        replace(ANSWER, asked_s=0.9),  # may have been sent before the canary was there
        replace(ANSWER, ended_s=2.0),
        replace(ANSWER, wanted="v-1"),
        FAILURE,
    ]
    trial = on_trial([*open_to_it, *others], 1.0, 2.0)
    assert trial == open_to_it
    assert canary_shares(trial, "v-2") == {"fraud": {"answers": 4, "share": 0.25}}


def entries_of(version: str, asked_s: float) -> Iterator[Entry]:
    """Yield answers of a version to many ids, each a second after the one before."""
    for i in range(100):
        yield Entry(f"r-{i}", "fraud", STABLE, version, "", asked_s + i, asked_s + i + 0.5)


def test_aliases_are_followed_once_an_answer_needs_them() -> None:
    stable, canary = Aliases("v-1"), Aliases("v-1", canary="v-2", canary_share=0.1)
    promoted = canary.promoted("v-2")
    old, new = list(entries_of("v-1", 10.0)), list(entries_of("v-2", 10.0))
    assert followed_s(old, stable, promoted, 10.0) is None
    assert followed_s(new, stable, promoted, 10.0) == 0.5
    assert followed_s(new, stable, promoted, 10.5) == 1.0  # not by what was sent before
    first = next(i for i in range(100) if canary.resolve(STABLE, f"r-{i}") == "v-2")
    assert followed_s(new, stable, canary, 10.0) == first + 0.5
    taken = [canary.resolve(STABLE, entry.request_id) == "v-2" for entry in new]
    by_canary = [entry for entry, is_taken in zip(new, taken, strict=True) if is_taken]
    assert followed_s(by_canary, canary, promoted, 10.0) is None  # the canary had these before
    assert followed_s(new, canary, promoted, 10.0) is not None
    pinned = [replace(entry, wanted="v-2") for entry in new]
    assert followed_s(pinned, stable, promoted, 10.0) is None


def test_p99_is_of_what_was_due_in_a_phase() -> None:
    due_s = [1.0, *np.linspace(3.0, 9.9, 99), *np.linspace(10.0, 19.9, 100)]
    outcome = Outcome(due_s, [500.0, *[5.0] * 99, *[7.0] * 98, 90.0, 90.0])
    phases = [Phase("steady", 2.0), Phase("swaps", 10.0), Phase("", 20.0)]
    assert stream_p99_ms(outcome, phases) == {"steady": 5.0, "swaps": 90.0}


def test_a_checkpoint_that_lacks_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="none of fraud, organs, forecast"):
        find_joint(tmp_path)
    model = MoETransformer(PRESETS["tiny"], ("fraud", "organs"))
    save_checkpoint(tmp_path, model, version="v-1", data="", metrics={}, command="")
    with pytest.raises(ConfigurationError, match="none of forecast; make it"):
        find_joint(tmp_path)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_versions_change_under_three_loads_without_an_error(tmp_path: Path) -> None:
    from cluster.platform import PlatformConfig, prepare_environment, start_ray

    prepare_environment()
    import ray
    from ray import serve

    from benchmarks.serving_rig import deployed
    from cluster.deployments import CoreReplica
    from cluster.loading import RegistrySource

    write_model(tmp_path / "joint")
    registry = copies(find_joint(tmp_path / "joint"), tmp_path / "registry")
    start_ray(PlatformConfig())
    try:
        with deployed(CoreReplica, RegistrySource(registry), gpus=0.0) as client:
            figures = measure(client, registry, Plan(seconds=1.0, stay_s=0.5, canary_requests=40))
    finally:
        serve.shutdown()
        ray.shutdown()
    assert figures["errors"] == 0
    assert list(figures["phases"]) == ["steady", "swaps", "canary", "promotion", "rollback"]
    for phase in figures["phases"].values():
        assert all(task["answers"] > 0 and not task["errors"] for task in phase.values())
    came = {
        name: set().union(*(task["versions"] for task in phase.values()))
        for name, phase in figures["phases"].items()
    }
    assert came["steady"] == {ONE}
    assert came["swaps"] == came["canary"] == {ONE, TWO}
    assert TWO in came["promotion"]
    assert ONE in came["rollback"]
    waits = {name: len(each) for name, each in figures["followed_s"].items()}
    assert waits == {"swaps": waits["swaps"], "canary": 1, "promotion": 1, "rollback": 1}
    assert figures["canary_shares"]["fraud"]["answers"] >= 40
    assert waits["swaps"] % 2 == 0
    assert registry.aliases() == Aliases(ONE, previous=TWO)
