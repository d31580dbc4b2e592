"""From a cloud checkpoint to a bundle that a box takes: trees exact, the student close, masks."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.maintenance.chances import first_failure
from apps.maintenance.edge.bundle import GOLDEN, INFO, MODEL, OUTPUTS, pack, read_info
from apps.maintenance.edge.forecast import Forecaster
from apps.maintenance.edge.sources import Window
from apps.maintenance.fleet import Fleet, Floats, Floats32
from apps.maintenance.inputs import COLUMNS, TELEMETRY_COLUMNS, Series
from apps.maintenance.protocol import HORIZONS
from apps.maintenance.simulate import SimulationConfig, simulate
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.publishing import publish_bundle
from apps.maintenance.training.azure_runs import Runs
from apps.maintenance.training.cloud import Cloud
from apps.maintenance.training.distill import NEAR, distil, own_caution
from apps.maintenance.training.edge_net import on_columns
from apps.maintenance.training.edge_report import edge_probs
from apps.maintenance.training.fit import Examples
from apps.maintenance.training.student import Student, cells_of
from apps.maintenance.training.student_graph import to_onnx
from apps.maintenance.training.train import CALIBRATION, training_part
from benchmarks.edge_rig import Box, FileServer, SignedFolder, set_up_box
from cluster.onnx import OnnxClient
from core_model.checkpoint import save_checkpoint
from core_model.config import PRESETS
from core_model.hazard import HazardHead, failed_by
from core_model.model import MoETransformer
from core_model.series import SeriesAdapter
from core_model.series_tasks import FORECAST, NUM_COMPONENTS
from kernels.trees import TreeEnsemble

NUM_TREES, DEPTH = 24, 3
ALL = list(range(len(COLUMNS)))


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return simulate(SimulationConfig(num_machines=4, num_days=60, seed=3))


@pytest.fixture(scope="module")
def examples(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder = tmp_path_factory.mktemp("runs")
    return Runs(training_part(fleet), folder, "cpu", "", 1, print).examples()


def some_trees(context: Floats32) -> TreeEnsemble:
    """Trees that split on any column, bucket columns too, at values that occur."""
    random = np.random.default_rng(1)
    width, inner = context.shape[1] + 3, 2**DEPTH - 1
    feature = random.integers(0, width, (NUM_TREES, inner)).astype(np.int32)
    seen = np.concatenate([context, np.full((len(context), 3), 24.0, np.float32)], axis=1)
    threshold = np.nan_to_num(seen[random.integers(0, len(seen), feature.shape), feature])
    leaf = torch.from_numpy(random.normal(0, 0.5, (NUM_TREES, 2**DEPTH)).astype(np.float16))
    answer = torch.eye(NUM_COMPONENTS)[torch.arange(NUM_TREES) % NUM_COMPONENTS]
    return TreeEnsemble(
        feature_SN=torch.from_numpy(feature),
        threshold_SN=torch.from_numpy(threshold.astype(np.float32)),
        missing_left_SN=torch.from_numpy(random.random(feature.shape) < 0.5),
        leaf_SL=leaf.float(),
        leaf_embedding_SLE=leaf.float().unsqueeze(2) * answer.unsqueeze(1),
        base=torch.zeros(()),
    )


@pytest.fixture(scope="module")
def checkpoint(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cloud model of random weights with trees, as ``trimoe maintenance train`` writes it."""
    torch.manual_seed(0)
    model = MoETransformer(PRESETS["tiny"], [FORECAST.name]).eval()
    adapter = model.adapters[FORECAST.name]
    assert isinstance(adapter, SeriesAdapter)
    adapter.fit_scaling(examples.batch(np.zeros((examples.machine.size, 16), np.float32), "cpu"))
    adapter.set_ensemble(some_trees(examples.series.context))
    folder = tmp_path_factory.mktemp("cloud")
    save_checkpoint(folder, model, version="forecast-3", data="-", metrics={}, command="-")
    chosen = {
        "caution": {str(h): 0.3 for h in HORIZONS},
        "interval_margin": 0.1,
        "life_cap_hours": 360,
        "service_period_hours": 336,
    }
    (folder / CALIBRATION).write_text(json.dumps(chosen))
    return folder


@pytest.fixture(scope="module")
def edge(fleet: Fleet, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    out = tmp_path_factory.mktemp("edge")
    assert distil(fleet, checkpoint, out, seed=0, threads=1, say=said.append) == out
    assert said
    return out


def some_series(examples: Examples, num: int = 200) -> Series:
    chosen = np.linspace(0, examples.machine.size - 1, num).astype(np.int64)
    return examples.series.take(chosen)


def ask(model: bytes, rows: Floats32, path: Path) -> Floats32:
    path.write_bytes(model)
    return OnnxClient(path, task="forecast", version="v", outputs=OUTPUTS).run(rows)


def test_without_the_student_the_edge_says_what_the_trees_of_the_cloud_say(
    checkpoint: Path, examples: Examples, tmp_path: Path
) -> None:
    cloud = Cloud.load(checkpoint)
    head = cloud.model.heads[FORECAST.name]
    assert isinstance(head, HazardHead)
    head.gate.fill_(-60.0)  # the trees alone
    series = some_series(examples)
    net = cloud.edge(Student(cells_of(series.context), 0, len(COLUMNS)).eval(), ALL)
    found = ask(to_onnx(net), series.context, tmp_path / "model.onnx")
    probs = cloud.answer(series)[:, : len(HORIZONS) * NUM_COMPONENTS]
    expected = probs.view(-1, len(HORIZONS), NUM_COMPONENTS).transpose(1, 2).flatten(1)
    assert expected.std(dim=0).min() > 0.01
    np.testing.assert_allclose(found[:, :16], expected.numpy(), atol=2e-6)


def test_graph_and_torch_agree_whatever_is_unknown(
    checkpoint: Path, examples: Examples, tmp_path: Path
) -> None:
    cloud = Cloud.load(checkpoint)
    rows = some_series(examples).context
    random = np.random.default_rng(0)
    rows[:, 0] = random.choice([np.nan, 0.0, 4.0, 5.0, 24.0, 48.0, 60.0, 72.0, 300.0], len(rows))
    rows[random.random(rows.shape) < 0.2] = np.nan
    rows[0] = np.nan
    torch.manual_seed(4)
    net = cloud.edge(Student(cells_of(rows), 0, len(COLUMNS)).eval(), ALL)
    hazard, life = net.forecast(rows)
    found = ask(to_onnx(net), rows, tmp_path / "model.onnx")
    np.testing.assert_allclose(found[:, :16], hazard.reshape(len(rows), -1), atol=2e-6)
    np.testing.assert_allclose(found[:, 16:], life, rtol=1e-4, atol=1e-3)
    assert (np.diff(life, axis=1) >= 0).all()


def test_trees_follow_their_columns_and_refuse_to_lose_one() -> None:
    context = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    trees = some_trees(context)
    with pytest.raises(ValueError, match="split on others"):
        on_columns(trees, [0, 2], 6)
    kept = sorted({int(each) for each in trees.feature_SN.unique() if each < 6})
    moved = on_columns(trees, kept[::-1], 6)
    inside = trees.feature_SN < 6
    back = torch.tensor(kept[::-1])[moved.feature_SN[inside].long()]
    assert torch.equal(back.int(), trees.feature_SN[inside])
    assert torch.equal(moved.feature_SN[~inside] - len(kept), trees.feature_SN[~inside] - 6)


def test_classes_come_back_from_probabilities_of_failing() -> None:
    hazard = torch.randn(40, len(HORIZONS), NUM_COMPONENTS, generator=torch.manual_seed(0)) - 2
    failed = failed_by(hazard.double()).transpose(1, 2).numpy()
    np.testing.assert_allclose(
        edge_probs(failed), first_failure(torch.sigmoid(hazard.double()).numpy())
    )


def test_bundle_says_what_it_reads_and_proves_itself(edge: Path) -> None:
    info = read_info(edge)
    assert (info.version, info.variant, info.name) == (3, "both", "forecast-both-3")
    assert info.features[0] == "to_visit_h"
    assert info.service_period_hours == 336
    assert "mean_3h_0" in info.optional
    assert {"age_years", "model_0"} <= set(info.required)
    own = info.caution[HORIZONS.index(48)]
    assert 0.1 < own <= 0.3  # the cloud's is .3
    assert info.alerts.threshold == pytest.approx(own / (1 + own), abs=1e-6)
    assert {f"macro_f1_{h}h" for h in HORIZONS} <= set(info.accuracy)
    forecaster = Forecaster(edge)
    assert forecaster.prove() < 1e-3
    assert forecaster.forecast(forecaster.golden.features).is_sane.all()
    assert (edge / MODEL).stat().st_size < 1_000_000


def test_edge_is_more_wary_by_the_spread_of_its_error_near_the_threshold() -> None:
    odds = np.linspace(-8, 4, 2001)  # of failing, at every horizon alike
    error = np.where(np.arange(odds.size) % 2, 0.5, -0.1)

    def probs(log_odds: Floats) -> Floats:
        failing = 1 / (1 + np.exp(-log_odds))
        classes = np.stack([1 - failing, failing, *np.zeros((3, failing.size))], axis=1)
        return np.repeat(classes[:, None], len(HORIZONS), axis=1)

    caution = dict.fromkeys(HORIZONS, 0.2)
    near = np.abs(odds - np.log(0.2)) < NEAR
    found = own_caution(caution, probs(odds), probs(odds + np.where(near, error, 9.0)))
    np.testing.assert_allclose(found, 0.2 * np.exp(0.2 - 0.3), rtol=1e-3)
    assert own_caution(caution, probs(odds[:2]), probs(odds[:2])) == (0.2,) * len(HORIZONS)


def test_student_is_nearer_to_the_cloud_than_the_trees_alone(
    edge: Path, checkpoint: Path, examples: Examples
) -> None:
    series = some_series(examples)
    cloud = Cloud.load(checkpoint)
    probs = cloud.answer(series)[:, :16].view(-1, 4, 4).transpose(1, 2).numpy()
    forecaster = Forecaster(edge)
    columns = [COLUMNS.index(name) for name in forecaster.info.features]
    found = forecaster.forecast(series.context[:, columns]).hazard
    head = cloud.model.heads[FORECAST.name]
    assert isinstance(head, HazardHead)
    head.gate.fill_(-60.0)
    alone = cloud.answer(series)[:, :16].view(-1, 4, 4).transpose(1, 2).numpy()
    assert np.abs(found - probs).mean() < 0.5 * np.abs(alone - probs).mean()


def test_equal_seeds_give_equal_bytes(
    fleet: Fleet, checkpoint: Path, edge: Path, tmp_path: Path
) -> None:
    distil(fleet, checkpoint, tmp_path, seed=0, threads=1, say=lambda _: None)
    for name in (INFO, GOLDEN, MODEL):
        assert (tmp_path / name).read_bytes() == (edge / name).read_bytes()


def test_box_takes_it_and_makes_do_with_what_is_known(edge: Path, tmp_path: Path) -> None:
    signed = SignedFolder(tmp_path / "repository")
    info = read_info(edge)
    packed = pack(info, *((edge / name).read_bytes() for name in (GOLDEN, MODEL)))
    offer = publish_bundle(signed.repository, packed)
    with FileServer(signed.folder) as server:
        set_up_box(tmp_path / "box", signed.root)
        box = Box(tmp_path / "box", server.url)
        assert box.take(offer.path) is Outcome.SWITCHED
        box.confirm()
    blind = {COLUMNS[i] for i in TELEMETRY_COLUMNS}
    values = dict.fromkeys(info.features, 1.0)
    known = {name: value for name, value in values.items() if name not in blind}
    nameless = {name: value for name, value in values.items() if name != "age_years"}
    at = "2026-01-01T00:00:00Z"
    box.memory.add([Window(f"m{i}", at, each) for i, each in enumerate((values, known, nameless))])
    box.agent.forecast_once()
    assert (box.agent.counts.windows, box.agent.counts.incomplete) == (2, 1)
    box.close()


def test_record_without_telemetry_gives_a_bundle_of_logs(
    fleet: Fleet, checkpoint: Path, tmp_path: Path
) -> None:
    blind = replace(fleet, telemetry=np.full_like(fleet.telemetry, np.nan))
    distil(blind, checkpoint, tmp_path, seed=0, threads=1, say=lambda _: None)
    info = read_info(tmp_path)
    asked = {name for name in info.features if name.startswith("mean_")}
    assert info.variant == "logs"
    assert asked <= set(info.optional)  # kept for the sake of trees that split on them
    assert Forecaster(tmp_path).prove() < 1e-3


@pytest.mark.slow
def test_agent_and_features_need_neither_torch_nor_pandas() -> None:
    code = (
        "import apps.maintenance.edge.service, apps.maintenance.inputs, sys;"
        "print([n for n in ('torch', 'ray', 'pandas', 'onnx', 'sklearn') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
