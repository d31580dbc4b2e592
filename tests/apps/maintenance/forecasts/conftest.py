"""A generated plant, and an untrained model that answers as the shared deployment does."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apps.maintenance.fleet import Fleet
from apps.maintenance.forecasts.calibration import FILE, MANIFEST, Calibration
from apps.maintenance.protocol import HORIZONS
from apps.maintenance.simulate import COMPONENTS, ERRORS, SENSORS, SimulationConfig, simulate
from cluster.loading import LoadedModel
from cluster.local import LocalClient
from cluster.step import StepRunner
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.tasks import registered_tasks

VERSION = "forecast-test"


def write_model_folder(folder: Path, caution: float) -> Path:
    """Write what stands beside weights; every horizon has the same caution."""
    held_out = {"macro_f1": 0.75, "false_alarms_per_machine_month": 0.2}
    record = {
        "caution": {str(h): caution for h in HORIZONS},
        "interval_margin": 0.1,
        "life_cap_hours": 360,
        "service_period_hours": 336,
        "components": COMPONENTS,
        "errors": ERRORS,
        "sensors": SENSORS,
        "held_out": {str(h): held_out for h in HORIZONS},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(record))
    (folder / MANIFEST).write_text(json.dumps({"version": VERSION}))
    return folder


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    return simulate(SimulationConfig(num_machines=4, num_days=20, seed=5))


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    return Calibration.read(write_model_folder(tmp_path / "model", 1.0))


@pytest.fixture(scope="session")
def client() -> Iterator[LocalClient]:
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    model = MoETransformer(config, ("forecast",)).eval()
    tasks = {"forecast": registered_tasks()["forecast"]}
    runner = StepRunner(model, tasks, config.num_experts, config.num_layers)
    with LocalClient(LoadedModel(runner, VERSION)) as found:
        yield found
