"""What ``trimoe bench edge`` measures with: LightGBM as ONNX, a real box, a table."""

import sys
from pathlib import Path

import numpy as np
import pytest

from apps.maintenance.protocol import HORIZONS, hours_to_failure, labels
from apps.maintenance.simulate import SimulationConfig, simulate
from apps.maintenance.training import baseline
from apps.maintenance.training.baseline import class_probs, fit_classes
from apps.maintenance.training.edge_report import CLOUD, Opinion, compare, held_rows
from apps.maintenance.training.train import training_part
from benchmarks.edge_box import Trial, quantiles
from benchmarks.edge_models import FEATURES, golden_features, make_bundle
from benchmarks.edge_peers import OnnxTrees

SENSED = ("age_years", "mean_3h_0", "mean_24h_1", "mean_48h_2", "mean_12h_3", "error_age_0")


def test_quantiles_are_those_of_the_values() -> None:
    assert quantiles(list(range(101))) == {"p50": 50.0, "p99": 99.0}


def test_share_of_the_clouds_events_is_counted_against_the_cloud() -> None:
    part = training_part(simulate(SimulationConfig(num_machines=6, num_days=100, seed=1)))
    rows = held_rows(part)
    hours = hours_to_failure(part.fleet.failures, rows, 4)
    truth = np.stack([labels(hours, horizon) for horizon in HORIZONS], axis=1)
    knows = np.eye(5)[truth]
    is_even = rows.machine % 2 == 0
    half = np.where(is_even[:, None, None], knows, np.eye(5)[0])  # blind to odd machines
    caution = dict.fromkeys(HORIZONS, 1.0)
    figures = compare(part, {CLOUD: Opinion(knows, caution), "half": Opinion(half, caution)})
    events = part.events(72)
    assert 0 < (events.machine % 2 == 0).sum() < events.machine.size
    assert figures[CLOUD]["72"]["events_caught"] == 1.0
    assert figures[CLOUD]["72"]["share_of_cloud"] == 1.0
    expected = (events.machine % 2 == 0).mean()
    assert figures["half"]["72"]["share_of_cloud"] == pytest.approx(expected)


@pytest.mark.slow
def test_onnx_says_what_lightgbm_says_also_where_values_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {**baseline.PARAMETERS, "n_estimators": 50}
    monkeypatch.setattr(baseline, "PARAMETERS", few)
    part = training_part(simulate(SimulationConfig(num_machines=8, num_days=100, seed=2)))
    peer = OnnxTrees(part, 0, SENSED, tmp_path, 1, lambda _: None)
    said = peer.opinion()
    columns = peer._inputs(part.rows)
    assert np.isnan(columns).any()
    hours = hours_to_failure(part.fleet.failures, part.rows, 4)
    train = part.train(72)
    booster = fit_classes(columns[train], labels(hours, 72)[train], 0, 1)
    expected = class_probs(booster, peer._inputs(held_rows(part)), np.arange(5))
    apart = np.abs(said.probs[:, -1] - expected).max(axis=1)
    assert np.mean(apart < 1e-4) > 0.99  # the file's thresholds are float32, LightGBM's double
    assert apart.max() < 0.05


@pytest.mark.slow
def test_box_forecasts_in_this_process_and_in_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.edge_box._SETTLE_S", 1.0)  # 128 windows take .03 s
    rows = np.tile(golden_features(), (4, 1))
    trial = Trial(tmp_path / "trial", make_bundle(1), FEATURES, rows)
    trial.set_up()
    took = trial.latencies()
    assert all(len(values) == len(rows) - 50 for values in took.values())
    assert np.median(took["model"]) < np.median(took["forecast"]) < np.median(took["turn"])
    found = trial.process(Path(sys.executable))
    assert found["windows"] == len(rows)
    assert 0 < found["start_s"] < 60
    assert 20 < found["rss_mb"] <= found["rss_peak_mb"]
