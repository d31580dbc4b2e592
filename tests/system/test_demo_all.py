"""``trimoe demo --all``, short: one platform, one untrained model, three applications at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apps.imaging.calibration import FILE as ORGANS_FILE
from apps.imaging.calibration import HU_EDGES
from apps.imaging.calibration import Calibration as OrganCalibration
from apps.imaging.segmentation import ORGANS
from apps.maintenance.forecasts.calibration import FILE as FORECAST_FILE
from apps.maintenance.protocol import HORIZONS
from apps.maintenance.simulate import COMPONENTS, ERRORS, SENSORS
from core_model.checkpoint import save_checkpoint
from core_model.config import PRESETS
from core_model.model import MoETransformer

TASKS = ("fraud", "organs", "forecast")
OLD_KEYS = {"inputs", "decisions", "dead_letters", "tx_per_s", "p50_ms", "p99_ms", "seconds"}
NUM_PROFILE = len(HU_EDGES) - 1 + 6  # tissues; three sizes, step, and two pixel distances


def write_model(folder: Path) -> None:
    """Write seeded weights of the three tasks, and calibrations that let everything pass."""
    torch.manual_seed(0)
    model = MoETransformer(PRESETS["tiny"], TASKS)
    save_checkpoint(
        folder, model, version="shared-0", data="none: untrained", metrics={}, command="a test"
    )
    OrganCalibration(
        least_sure=dict.fromkeys(ORGANS, 0.9),
        miss_rate=0.1,
        profile_mean=(0.0,) * NUM_PROFILE,
        profile_scale=(1.0,) * NUM_PROFILE,
        farthest=3.0,
        refer_below=0.5,
        sensitivity=0.95,
    ).save(folder / ORGANS_FILE)
    forecast = {
        "caution": {str(h): 1.0 for h in HORIZONS},
        "interval_margin": 0.0,
        "life_cap_hours": 360,
        "service_period_hours": 0,
        "components": COMPONENTS,
        "errors": ERRORS,
        "sensors": SENSORS,
        "held_out": {},
    }
    (folder / FORECAST_FILE).write_text(json.dumps(forecast), "utf-8")


@pytest.mark.slow
@pytest.mark.ray
def test_everything_of_three_applications_comes_back_from_one_model(tmp_path: Path) -> None:
    write_model(tmp_path / "models/shared")
    report = tmp_path / "demo.json"
    command = [sys.executable, "-m", "apps.cli", "demo", "--all", "--json", str(report)]
    command += ["--models", str(tmp_path / "models"), "--transactions", "600", "--rate", "150"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads(report.read_text("utf-8"))
    assert set(figures) > OLD_KEYS
    assert figures["inputs"] == figures["decisions"] + figures["dead_letters"] >= 600
    assert figures["cases_done"] == figures["cases"] == 2
    assert figures["cases_quarantined"] == 0
    assert figures["forecasts_answered"] == figures["forecasts"] == 105
    assert figures["p99_ratio"] == pytest.approx(figures["p99_beside_ms"] / figures["p99_alone_ms"])
    assert set(figures["tokens"]) == set(TASKS)
    assert min(figures["tokens"].values()) > 0
    assert figures["processes_with_model"] == 1
    (replica,) = [each for each in figures["processes"] if each["has_model"]]
    assert "InferenceCore" in replica["name"]
    assert replica["has_torch"]
    workers = [each for each in figures["processes"] if "Worker" in each["name"]]
    assert workers
    assert not any(each["has_torch"] for each in workers)
    assert "tokens forecast interactive" in done.stdout
