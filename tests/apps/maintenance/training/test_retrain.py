"""Retraining: a core that stays, a record that is cut, a job that is killed, one publication."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apps.maintenance.edge.bundle import GOLDEN, INFO, MODEL, BundleInfo, pack, unpack
from apps.maintenance.edge.spread import steady_spreads
from apps.maintenance.inputs import LIFE_CAP_HOURS
from apps.maintenance.protocol import grid_rows
from apps.maintenance.simulate import NOISE, SimulationConfig, simulate
from apps.maintenance.sync.boxes import BoxReport
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.evidence import end_of
from apps.maintenance.sync.keys import make_keys
from apps.maintenance.sync.policy import Plan, Status
from apps.maintenance.sync.publishing import prove, publish_bundle
from apps.maintenance.sync.repository import Repository
from apps.maintenance.sync.retrainings import PAUSE_S, State
from apps.maintenance.sync.service import NUM_KEYS
from apps.maintenance.sync.triggers import RULES, Trigger
from apps.maintenance.tables import write_fleet
from apps.maintenance.training.azure_runs import Runs
from apps.maintenance.training.fit import Fit
from apps.maintenance.training.retrain import Retrainer
from apps.maintenance.training.retrain_fit import TUNING, core_state, fine_tune
from apps.maintenance.training.retrain_job import (
    BUNDLE,
    CHECKPOINT,
    HISTORY,
    Order,
    Say,
    run_order,
)
from apps.maintenance.training.retrain_record import (
    LEAST_FAILURES,
    Span,
    cut,
    find_drift,
    named_columns,
)
from apps.maintenance.training.train import CALIBRATION, training_part
from benchmarks.edge_models import Fault, make_bundle, make_history
from benchmarks.edge_rig import SignedFolder
from core_model.checkpoint import load_checkpoint, save_checkpoint
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.series_tasks import FORECAST, NUM_HAZARDS

GROUP = "plant"
RECORD = simulate(SimulationConfig(num_machines=6, num_days=60, seed=3))
DAY_S = 86_400.0


def bundle_of(version: int, fault: Fault = Fault.NONE) -> bytes:
    """Return a bundle that was trained until the end of the record."""
    files = unpack(make_bundle(version, fault))
    info = replace(BundleInfo.from_json(files[INFO]), trained_until=end_of(RECORD))
    return pack(info, files[GOLDEN], files[MODEL])


def write_parts(order: Order, bundle: bytes) -> Path:
    order.folder.mkdir(parents=True, exist_ok=True)
    make_history(2, 2).write(order.folder / HISTORY)
    (order.folder / BUNDLE).write_bytes(bundle)
    return order.folder / BUNDLE


def die_once(order: Order, say: Say) -> Path:
    """Be killed in the first attempt, and finish in the second."""
    order.folder.mkdir(parents=True, exist_ok=True)
    killed = order.folder / "killed"
    if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    say("second attempt")
    return write_parts(order, bundle_of(order.version))


def fail(order: Order, say: Say) -> Path:
    say(f"version {order.version}")
    raise ValueError("no such sensor")


class Plant:
    """A group on version 1 whose model has grown old, with record and keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now_s = end_of(RECORD) + DAY_S
        keys = {role: make_keys(folder / "keys", {role: num}) for role, num in NUM_KEYS.items()}
        self.signed = SignedFolder(folder / "repository", keys)
        self.control = Control(folder, lambda: self.now_s)
        write_fleet(RECORD, folder / "record")
        offer = publish_bundle(self.signed.repository, bundle_of(1))
        plan = Plan(shares=(1.0,), approvals=())
        repository, history = self.signed.repository, make_history(2, 2)
        self.report(1, offer.digest)
        self.control.begin_rollout(repository, offer, GROUP, plan, history)
        self.report(1, offer.digest)
        assert self.control.rollouts.stable(GROUP) == offer.path
        self.retrainer = Retrainer(
            self.control, GROUP, folder / "record", folder / "none", [folder / "keys"]
        )

    def report(self, version: int, digest: str) -> None:
        facts = {
            "agent": "box",
            "group": GROUP,
            "version": version,
            "digest": digest,
            "confirmed": True,
            "failed": {},
            "outcome": "",
        }
        self.now_s += 1
        self.control.rollouts.report(BoxReport.from_record("box", facts))

    def grow_old(self) -> None:
        self.now_s = end_of(RECORD) + (RULES[Trigger.AGE].raise_at + 1) * DAY_S

    def prepare(self, number: int, bundle: bytes) -> None:
        """Lay out what the job of a retraining would have made."""
        folder = self.control.retraining / str(number)
        folder.mkdir(parents=True)
        make_history(2, 2).write(folder / HISTORY)
        (folder / BUNDLE).write_bytes(bundle)

    @property
    def versions(self) -> list[int]:
        targets = self.signed.repository.targets.targets.values()
        return sorted(each.custom["version"] for each in targets if "forms" in (each.custom or {}))

    @property
    def actions(self) -> list[str]:
        return [each.action for each in self.control.audit(1000)]


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    found = Plant(tmp_path)
    with found.control:
        yield found


def test_fine_tuning_leaves_the_core_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apps.maintenance.training.fit.LEAST_STEPS", 6)
    torch.manual_seed(0)
    deployed = MoETransformer(PRESETS["tiny"], [FORECAST.name])
    before = {name: each.clone() for name, each in deployed.state_dict().items()}
    runs = Runs(training_part(RECORD), tmp_path, "cpu", "tiny", 1, print)
    examples = runs.examples()
    few = examples.take(np.arange(examples.machine.size) < 96)
    tree = np.zeros((96, NUM_HAZARDS), np.float32)
    settings = replace(TUNING, batch_size=32, epochs=1)
    tuned = fine_tune(deployed, few, tree, Fit(0, settings=settings))
    core = core_state(tuned)
    assert any(name.endswith("expert_bias") for name in core)
    assert all(torch.equal(each, before[name]) for name, each in core.items())
    learned = {
        name for name, each in tuned.named_parameters() if not torch.equal(each, before[name])
    }
    assert {name.partition(".")[0] for name in learned} == {"adapters", "heads"}
    after = deployed.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())


class KilledError(BaseException):
    """Stands for the end of a process."""


def killed_at(stage: str) -> Say:
    """Return a ``say`` that ends the job where it says something."""

    def say(text: str) -> None:
        if text.startswith(stage):
            raise KilledError

    return say


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apps.maintenance.training.fit.LEAST_STEPS", 6)
    monkeypatch.setattr("apps.maintenance.training.trees.NUM_ROUNDS", 10)
    once = replace(TUNING, epochs=1)
    monkeypatch.setattr("apps.maintenance.training.retrain_job.TUNING", once)
    torch.manual_seed(0)
    facts: dict[str, Any] = {"data": "none", "metrics": {}, "command": "none"}
    deployed = MoETransformer(PRESETS["tiny"], [FORECAST.name])
    save_checkpoint(tmp_path / "forecast-1", deployed, version="forecast-1", **facts)
    chosen = {"life_cap_hours": LIFE_CAP_HOURS}
    (tmp_path / "forecast-1" / CALIBRATION).write_text(json.dumps(chosen))
    write_fleet(RECORD, tmp_path / "record")
    info = BundleInfo.from_json(unpack(bundle_of(1))[INFO])
    order = Order(tmp_path / "1", tmp_path / "record", tmp_path / "forecast-1", info, 7)
    with pytest.raises(KilledError):
        run_order(order, killed_at("calibrated"))
    with monkeypatch.context() as patch:
        for name in ("cross_fit_trees", "calibrate"):
            patch.setattr(f"apps.maintenance.training.train.{name}", None)
        with pytest.raises(KilledError):
            run_order(order, killed_at("distilled"))
        for name in ("retrain_job.fine_tune", "train.fit_hazard_trees"):
            patch.setattr(f"apps.maintenance.training.{name}", None)
        patch.setattr("apps.maintenance.training.distill.distil", None)
        packed = run_order(order, print).read_bytes()
    prove(packed)
    found = BundleInfo.from_json(unpack(packed)[INFO])
    assert (found.version, found.trained_until) == (7, end_of(RECORD))
    assert found.reference
    before, after = (
        core_state(load_checkpoint(each)[0]) for each in (order.deployed, order.folder / CHECKPOINT)
    )
    assert all(torch.equal(each, after[name]) for name, each in before.items())


def test_a_cut_record_keeps_distances_and_what_was_known() -> None:
    first, last = 5 * 24, 45 * 24
    found = cut(RECORD, Span(first, last))
    rows = grid_rows(found)
    kept = rows.take(rows.hour > 48)  # rolling means reach back over the cut
    whole = replace(kept, hour=kept.hour + first)
    here, there = named_columns(found, kept), named_columns(cut(RECORD, Span(0, last)), whole)
    for name, values in here.items():
        np.testing.assert_allclose(values, there[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert found.failures.hour.max(initial=0) < last - first


def test_the_weeks_since_a_drift_are_found() -> None:
    fleet = simulate(SimulationConfig(num_machines=40, num_days=112, seed=5))
    day = 70
    info = BundleInfo.from_json(unpack(make_bundle(1))[INFO])
    calm = cut(fleet, Span(0, day * 24))
    rows = grid_rows(calm)
    columns = named_columns(calm, rows)
    names = [name for name in columns if name.startswith("mean_24h")]
    reference = steady_spreads({name: columns[name] for name in names}, rows.hour // 168)
    assert reference.keys() == set(names)
    known = replace(info, features=tuple(names), reference=reference)
    assert not find_drift(calm, known).is_unlabelled
    assert find_drift(calm, known).span == Span(0, calm.num_hours)
    telemetry = fleet.telemetry.copy()
    telemetry[:, day * 24 :] += 3 * NOISE
    drifted = replace(fleet, telemetry=telemetry.astype(np.float32))
    found = find_drift(drifted, known)
    assert abs(found.first - day * 24) <= 168
    assert found.is_unlabelled
    assert found.span == Span(0, drifted.num_hours)  # nothing may begin, see ``attend``
    assert replace(found, num_failures=LEAST_FAILURES).span == Span(found.first, found.last)


def test_nothing_is_due_while_the_model_is_young(plant: Plant) -> None:
    assert plant.retrainer.attend() is None
    assert plant.versions == [1]


def test_a_bundle_is_published_and_rolled_out_once(plant: Plant) -> None:
    plant.prepare(1, bundle_of(2))
    plant.grow_old()
    found = plant.retrainer.attend()
    assert found is not None
    assert (found.state, found.version, found.reasons) == (State.ROLLED_OUT, 2, ("age",))
    plant.now_s += 2 * PAUSE_S
    assert plant.retrainer.attend() is None  # its rollout is open
    rollout = plant.control.rollouts.get(found.rollout)
    assert rollout.status is Status.RUNNING  # an operator has to approve beyond the canary
    assert rollout.plan.approvals == (0,)
    assert plant.versions == [1, 2]


@pytest.mark.parametrize("is_published", [False, True])
def test_killed_around_the_publication_it_goes_on_and_publishes_nothing_twice(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, *, is_published: bool
) -> None:
    plant.prepare(1, bundle_of(2))
    plant.grow_old()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner, step = (Control, "begin_rollout") if is_published else (Repository, "publish")
        patch.setattr(owner, step, killed)
        with pytest.raises(KeyboardInterrupt):
            plant.retrainer.attend()
    assert plant.versions == ([1, 2] if is_published else [1])
    found = plant.retrainer.attend()
    assert found is not None
    assert (found.number, found.state) == (1, State.ROLLED_OUT)
    assert plant.versions == [1, 2]
    assert len(plant.control.rollouts.list()) == 2
    assert plant.actions.count("begin retraining") == 1


def test_without_keys_the_bundle_waits_for_whoever_has_them(plant: Plant) -> None:
    plant.prepare(1, bundle_of(2))
    plant.grow_old()
    keyless = replace(plant.retrainer, keys=())
    found = keyless.attend()
    assert found is not None
    assert found.state is State.WAITING
    assert "sync publish --bundle" in found.detail
    path = plant.control.retraining / "1" / BUNDLE
    publish_bundle(plant.signed.repository, path.read_bytes(), [GROUP])
    found = keyless.attend()
    assert found is not None
    assert (found.number, found.state) == (1, State.ROLLED_OUT)


def test_a_version_that_somebody_took_meanwhile_is_passed_over(plant: Plant) -> None:
    plant.prepare(1, bundle_of(2))
    publish_bundle(plant.signed.repository, make_bundle(2, seed=7))
    plant.grow_old()
    found = plant.retrainer.attend()
    assert found is not None
    assert (found.state, found.version) == (State.ROLLED_OUT, 3)
    assert plant.versions == [1, 2, 3]


def test_a_model_that_warns_later_is_refused_by_the_shadow(plant: Plant) -> None:
    plant.prepare(1, bundle_of(2, Fault.LATE))
    plant.grow_old()
    found = plant.retrainer.attend()
    assert found is not None
    assert found.state is State.REFUSED
    assert "lead" in found.detail
    assert plant.control.rollouts.stable(GROUP) == "forecast-both/1.tar"


def test_a_bundle_that_cannot_be_read_is_a_failure_with_a_name(plant: Plant) -> None:
    plant.prepare(1, b"no bundle")
    plant.grow_old()
    found = plant.retrainer.attend()
    assert found is not None
    assert found.state is State.FAILED
    assert "retraining failed" in plant.actions
    plant.prepare(2, bundle_of(2))
    plant.now_s += PAUSE_S
    found = plant.retrainer.attend()
    assert found is not None
    assert (found.number, found.state) == (2, State.ROLLED_OUT)


@pytest.mark.ray
def test_jobs_on_ray_survive_a_kill_and_say_why_they_fail(plant: Plant) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own imports warn
        from ray import cloudpickle, is_initialized

        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        plant.grow_old()
        found = replace(plant.retrainer, work=fail).attend()
        assert found is not None
        assert (found.state, found.detail) == (State.FAILED, "job: ValueError: no such sensor")
        assert not is_initialized()
        plant.now_s += PAUSE_S
        found = replace(plant.retrainer, work=die_once).attend()
        assert not is_initialized()
    assert found is not None
    assert (found.state, found.version) == (State.ROLLED_OUT, 2)
    log = plant.control.retraining / "2" / "log.txt"
    assert log.read_text().count("second attempt") == 1
    assert plant.versions == [1, 2]
