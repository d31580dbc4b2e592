"""The evaluation of remaining life on a made-up table: any in the layout will do."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from apps.maintenance.training import cmapss_runs, life_fit
from apps.maintenance.training.evaluate import evaluate_cmapss

NUM_SENSORS = 5


def write_subset(folder: Path, subset: str) -> None:
    """Units that wear at their own rate under two operating points; sensor 5 stands still."""
    rng = np.random.default_rng(0)
    truth = []
    for part, num_units in (("train", 16), ("test", 12)):
        frames = []
        for unit in range(num_units):
            life = int(rng.integers(130, 220))
            cycle = np.arange(1, life + 1)
            regime = rng.integers(0, 2, life)
            wear = np.exp((cycle - life) / 40.0)[:, None] * np.array([1.0, -1.0, 0.5, 2.0, 0.0])
            noise = rng.normal(0.0, 0.05, (life, NUM_SENSORS)) * [1, 1, 1, 1, 0]
            sensors = wear + noise + 10.0 * regime[:, None]
            frame = pd.DataFrame(sensors, columns=[f"sensor_{i + 1}" for i in range(NUM_SENSORS)])
            frame["op_setting_1"] = 20.0 * regime + rng.normal(0.0, 0.01, life)
            frame["unit_id"], frame["cycle"], frame["rul"] = 4 * unit + 1, cycle, life - cycle
            if part == "test":
                last = int(rng.integers(60, life))
                truth.append(life - last)
                frame = frame.iloc[:last].drop(columns="rul")
            frames.append(frame)
        pd.concat(frames).to_parquet(folder / f"{part}_{subset}.parquet")
    np.savetxt(folder / f"RUL_{subset}.txt", truth, fmt="%d")


@pytest.mark.slow
def test_any_table_in_the_layout_is_evaluated_and_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life_fit, "NUM_ROUNDS", 150)
    monkeypatch.setattr(cmapss_runs, "MOST_ROWS", 1_000)  # of 2,800
    monkeypatch.setattr(cmapss_runs, "SETTINGS", replace(life_fit.SETTINGS, epochs=3))
    write_subset(tmp_path, "XY07")
    args = Namespace(
        dataset="cmapss",
        subset="XY07",
        data=tmp_path,
        seeds=1,
        preset="tiny",
        device="cpu",
        work=tmp_path / "work",
        threads=1,
    )
    said: list[str] = []
    found = evaluate_cmapss(args, said.append)
    assert "2 regimes, sensors 1, 2, 3, 4" in said[0]
    assert found["rmse_capped"] < 15.0  # a constant forecast has 35
    assert found["baseline"].keys() == {"rmse", "score", "rmse_capped", "score_capped"}
    assert 0.5 < found["interval_coverage"] <= 1.0
    assert [seed["seed"] for seed in found["seeds"]] == [0]
    said.clear()
    assert evaluate_cmapss(args, said.append) == found
    assert said == []
