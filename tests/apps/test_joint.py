"""Joint training by its command, on small generated data."""

import json
from pathlib import Path

import pytest
import torch

from apps import cli
from apps.fraud.lesson import FraudLesson
from apps.fraud.simulate import SimulationConfig, simulate
from apps.joint import Lesson, Plan, fit
from apps.maintenance.simulate import SimulationConfig as FleetConfig
from apps.maintenance.simulate import simulate as simulate_fleet
from apps.maintenance.training.lesson import ForecastLesson
from core_model.checkpoint import load_checkpoint, save_checkpoint
from core_model.config import PRESETS
from core_model.hazard import HazardHead
from core_model.joint import LoopSettings
from core_model.tabular import TabularAdapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> list[Lesson]:
    work = tmp_path_factory.mktemp("lessons")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apps.fraud.chaining.NUM_TREES", 20)
        patch.setattr("apps.maintenance.training.trees.NUM_ROUNDS", 10)
        world = SimulationConfig(num_cards=150, num_terminals=300, num_days=75)
        fraud = FraudLesson.of(simulate(world), "a small world", work / "fraud", 0)
        fleet = simulate_fleet(FleetConfig(num_machines=10, num_days=60))
        return [fraud, ForecastLesson.of(fleet, "a small fleet", work / "forecast", 0)]


def test_one_model_of_all_lessons_is_kept_with_what_they_chose(
    lessons: list[Lesson], tmp_path: Path
) -> None:
    plan = Plan(PRESETS["tiny"], LoopSettings(steps=12), 0, "cpu")
    losses: list[dict[str, float]] = []
    model = fit(lessons, plan, lambda _s, _n, said: losses.append(dict(said)))
    assert set(losses[0]) == {"fraud", "forecast"}
    for each in lessons:
        each.finish(model, tmp_path)
    measured = {each.task: each.measure(model) for each in lessons}
    assert set(measured["forecast"]) == {f"macro_f1_{h}h" for h in (4, 24, 48, 72)}
    assert 0.0 < measured["fraud"]["ap"] <= 1.0
    save_checkpoint(tmp_path, model, version="shared-1", data="", metrics={}, command="")
    again, manifest = load_checkpoint(tmp_path)
    assert manifest.tasks == ("fraud", "forecast")
    assert len(again.moe_layers) == PRESETS["tiny"].num_layers  # one stack
    chosen = json.loads((tmp_path / "forecast.json").read_text("utf-8"))
    assert set(chosen["caution"]) == {"4", "24", "48", "72"}


def test_a_checkpoint_is_levelled_and_what_is_trained_stays(
    lessons: list[Lesson], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(PRESETS["tiny"], LoopSettings(steps=2), 0, "cpu")
    model = fit(lessons, plan, lambda *_: None, is_levelled=False)
    older, newer = tmp_path / "old", tmp_path / "new"
    older.mkdir()
    for each in lessons:
        each.finish(model, older)
    save_checkpoint(older, model, version="one", data="d", metrics={"x": 1.0}, command="train")
    monkeypatch.setattr("apps.level.lessons_of", lambda *_: lessons)
    words = ["models", "level", str(older), "--out", str(newer)]
    report = tmp_path / "report.json"
    assert cli.main([*words, "--version", "two", "--json", str(report)]) == 0
    old, _ = load_checkpoint(older)
    new, manifest = load_checkpoint(newer)
    before, after = old.state_dict(), new.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    biases = {f"blocks.{i}.moe.expert_bias" for i in range(len(old.moe_layers))}
    assert biases <= changed <= biases | {"heads.forecast.gate"}  # which is calibrated
    assert (manifest.version, manifest.data, manifest.metrics["x"]) == ("two", "d", 1.0)
    assert manifest.command.startswith("train; trimoe ")
    assert (newer / "forecast.json").exists()
    for level in json.loads(report.read_text("utf-8"))["utilisation"].values():
        assert min(level["after"]) > max(0.5, sum(level["before"]) / len(level["before"]))
    assert cli.main(["models", "level", str(newer), "--out", str(newer)]) == 0  # in its place
    assert load_checkpoint(newer)[1].version == "two"


def test_what_is_held_out_was_not_trained_on(lessons: list[Lesson]) -> None:
    fraud, forecast = lessons
    assert isinstance(fraud, FraudLesson)
    assert isinstance(forecast, ForecastLesson)
    assert not set(fraud.examples.rows) & set(fraud.test.rows)
    assert not set(forecast.seen.examples.machine) & set(forecast.kept.examples.machine)


def test_without_trees_neither_lesson_hears_of_them(lessons: list[Lesson], tmp_path: Path) -> None:
    fraud, forecast = lessons
    assert isinstance(fraud, FraudLesson)
    assert isinstance(forecast, ForecastLesson)
    blind: list[Lesson] = [fraud.without_trees(), forecast.without_trees()]
    model = fit(blind, Plan(PRESETS["tiny"], LoopSettings(steps=10), 0, "cpu"), lambda *_: None)
    for each in blind:
        each.finish(model, tmp_path)
    head = model.heads["forecast"]
    assert isinstance(head, HazardHead)
    assert float(head.gate.sigmoid().min()) > 0.999
    adapter = model.adapters["fraud"]
    assert isinstance(adapter, TabularAdapter)
    assert adapter.ensemble.leaf_SL.shape[0] == 0
    assert not forecast.without_trees().test.tree.any()
