"""The guide docs/own-task.md, executed: a package beside this repository adds a task to it.

Every step runs in a process of its own, as it would for a reader; the package is made visible
by a folder on ``PYTHONPATH`` with the metadata that an installation would write.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from core_model.checkpoint import read_manifest
from core_model.tasks import registered_tasks

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/own-task.md").read_text()
FILE = re.compile(r"^`([\w./]+)`[^\n]*\n(?:[^`\n][^\n]*\n)*\n```\w+\n(.*?)^```$", re.M | re.S)
BOTH = """
import asyncio, json
from dataclasses import replace
import numpy as np, torch
from cluster.engine import Engine, blank_request
from cluster.loading import LoadedModel
from cluster.schemas import ServiceClass
from cluster.step import StepRunner
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.tasks import registered_tasks
from occupancy.data import draw_rooms

torch.manual_seed(0)
config, registry = PRESETS["tiny"], registered_tasks()
tasks = {name: registry[name] for name in ("occupancy", "tokens")}
model = MoETransformer(config, list(tasks)).eval()
runner = StepRunner(model, tasks, config.num_experts, config.num_layers)
rows, offsets, _ = draw_rooms(4, seed=0)
rooms = replace(
    blank_request(tasks["occupancy"], 1), request_id="rooms", features=rows, cu_seqlens=offsets,
    service_class=ServiceClass.INTERACTIVE,
)
bulk = replace(blank_request(tasks["tokens"], 3), request_id="bulk")

async def ask(*requests):
    engine = Engine(LoadedModel(runner, "both-1"))
    engine.start()
    answers = await asyncio.gather(*map(engine.infer, requests))
    steps = engine.status()["steps"]
    await engine.stop()
    return steps, [answer.outputs.tolist() for answer in answers]

print(json.dumps({"alone": asyncio.run(ask(rooms)), "both": asyncio.run(ask(rooms, bulk))}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the guide, and what an installer would say of them."""
    folder = tmp_path_factory.mktemp("package")
    files = dict(FILE.findall(GUIDE))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    metadata = folder / "trimoe_occupancy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"[{group}]\n" for group in project["entry-points"]]
    for points in project["entry-points"].values():
        lines += [f"{name} = {value}\n" for name, value in points.items()]
    (metadata / "entry_points.txt").write_text("".join(lines))
    return folder


def run(package: Path, *arguments: str) -> str:
    """Run Python beside the package, away from this repository's folder."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(package: Path) -> Path:
    run(package, "-m", "occupancy.train", "models/occupancy")
    return package / "models/occupancy"


def test_this_repository_does_not_know_the_task() -> None:
    assert "occupancy" not in registered_tasks()


def test_the_guide_names_each_file_once() -> None:
    names = [name for name, _ in FILE.findall(GUIDE)]
    assert len(names) == len(set(names)) == GUIDE.count("```python") + GUIDE.count("```toml")


def test_it_learns(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert manifest.tasks == ("occupancy",)
    assert manifest.metrics["accuracy"] > 0.9
    assert manifest.metrics["utilisation"] > 0.8


def test_the_checkpoint_answers_in_process(package: Path, checkpoint: Path) -> None:
    lines = run(package, "-m", "occupancy.ask", str(checkpoint)).splitlines()
    right = [(float(line.split()[0]) > 0.5) == line.endswith("somebody") for line in lines]
    assert len(right) == 8
    assert sum(right) >= 7


def test_one_step_serves_it_beside_another_task(package: Path) -> None:
    found = json.loads(run(package, "-c", BOTH))
    (steps_alone, (alone,)), (steps_both, (rooms, bulk)) = found["alone"], found["both"]
    assert (steps_alone, steps_both) == (1, 1)
    assert len(bulk) == 3
    assert [row[0] for row in rooms] == pytest.approx([row[0] for row in alone], abs=1e-5)


def test_the_registry_lists_it(package: Path, checkpoint: Path) -> None:
    listed = run(package, "-m", "apps.cli", "models", "list", "--models", str(checkpoint.parent))
    assert re.match(r"occupancy +occupancy-1 +occupancy", listed)
