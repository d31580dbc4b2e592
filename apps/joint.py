"""``trimoe models train``: one checkpoint of all applications, trained in the same steps.

    OUT/manifest.json, model.safetensors    one block stack, an adapter and a head for each task
    OUT/organs.json, forecast.json          what the applications chose on held-out data
    WORK/state.pt, losses.jsonl             a run that was cut off goes on from there

Fraud and forecasts are learnt from generated data, organs from generated phantoms or labelled
volumes, adrenal shapes from a file of AdrenalMNIST3D; without that file there is no such task.
The only module that knows all applications' training.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

import torch

from apps.arguments import write_json
from apps.fraud.lesson import FraudLesson
from apps.fraud.simulate import SimulationConfig, simulate
from apps.imaging.training.fit import make_cases, read_cases
from apps.imaging.training.loop import VolumeSettings
from apps.imaging.training.organ_lesson import OrganLesson
from apps.imaging.training.shape_lesson import ShapeLesson
from apps.maintenance.simulate import SimulationConfig as FleetConfig
from apps.maintenance.simulate import simulate as simulate_fleet
from apps.maintenance.training.lesson import ForecastLesson
from core_model.balance import rebalance
from core_model.checkpoint import save_checkpoint
from core_model.config import PRESETS, MoEConfig
from core_model.joint import LoopSettings, Progress, Source, train
from core_model.model import MoETransformer
from core_model.packing import Encoded, RaggedBatch
from core_model.training import device_of, settle_norms

VERSION = "shared-{number}"
TOKENS_EACH = 400_000  # of each task, that the experts are balanced on


class Lesson(Protocol):
    """What an application brings to joint training."""

    @property
    def task(self) -> str:
        """Name in the registry."""
        ...

    @property
    def data(self) -> str:
        """What it learns from, in words for the manifest."""
        ...

    def source(self, device: str, seed: int) -> Source:
        """Return its draws."""
        ...

    def prepare(self, model: MoETransformer) -> None:
        """Set what is not trained: scales, and which experts take part."""
        ...

    def traffic(self, device: str) -> Iterator[RaggedBatch]:
        """Yield sequences as they are served, for batch norms and for balancing the experts."""
        ...

    def held_out(self, device: str) -> Iterator[RaggedBatch]:
        """Yield sequences as they are served that were not trained on."""
        ...

    def finish(self, model: MoETransformer, folder: Path) -> None:
        """Calibrate, put into the model what was fitted beside it, write files beside the weights."""
        ...

    def measure(self, model: MoETransformer) -> dict[str, float]:
        """Return the application's metrics on held-out data."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is to be trained.

    Args:
        config: Sizes of the shared blocks.
        settings: Of the loop.
        seed: Of weights and draws.
        device: Where.
    """

    config: MoEConfig
    settings: LoopSettings
    seed: int
    device: str


def fit(
    lessons: Sequence[Lesson],
    plan: Plan,
    progress: Progress,
    keep: Path | None = None,
    *,
    is_levelled: bool = True,
) -> MoETransformer:
    """Return a model of the lessons' tasks, trained, not yet finished.

    Args:
        lessons: One per task.
        plan: How.
        progress: As of ``train``.
        keep: Likewise.
        is_levelled: Whether the biases of the experts are solved on the traffic at the end.
    """
    torch.manual_seed(plan.seed)
    model = MoETransformer(plan.config, [each.task for each in lessons]).to(plan.device)
    for each in lessons:
        each.prepare(model)
    sources = [each.source(plan.device, plan.seed) for each in lessons]
    train(model, sources, plan.settings, progress, keep)
    for each in lessons:
        settle_norms(model, each.task, each.traffic(plan.device))
    if is_levelled:
        for each in lessons:
            rebalance(model, each.task, list(encoded_traffic(model, each)))
    return model


@torch.no_grad()
def encoded_traffic(model: MoETransformer, lesson: Lesson) -> Iterator[Encoded]:
    """Yield what the adapter makes of a task's traffic, up to ``TOKENS_EACH`` tokens and a batch."""
    num = 0
    for batch in lesson.traffic(device_of(model)):
        if num >= TOKENS_EACH:
            return
        pack = model.adapters[lesson.task](batch)
        num += pack.tokens_TD.shape[0]
        yield replace(pack, side={})  # maps of voxels are not needed here, and large


def main(args: argparse.Namespace) -> int:
    """Train all tasks in one model, report on held-out data, save the checkpoint."""
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - started:5.0f} s] {text}\n")

    plan = Plan(
        PRESETS[args.preset],
        LoopSettings(args.steps, balance_loss=args.balance_loss),
        args.seed,
        args.device,
    )
    lessons = lessons_of(args, say)
    work = work_of(args)
    progress = progress_in(work / "losses.jsonl", say)
    is_levelled = args.balance_loss == 0.0
    model = fit(lessons, plan, progress, work / "state.pt", is_levelled=is_levelled)
    args.out.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    for each in lessons:
        metrics |= finish(each, model, args.out)
        say(f"{each.task} finished")
    manifest = save_checkpoint(
        args.out,
        model.cpu(),
        version=VERSION.format(number=args.seed + 1),
        data="; ".join(each.data for each in lessons),
        metrics=metrics,
        command=command_line(),
    )
    figures = {"version": manifest.version, **metrics, "seconds": time.monotonic() - started}
    write_figures(figures, args.json)
    return 0


def finish(lesson: Lesson, model: MoETransformer, folder: Path) -> dict[str, float]:
    """Calibrate a trained task, write its files, and return its metrics by task and name."""
    lesson.finish(model, folder)
    measured = lesson.measure(model)
    return {f"{lesson.task}_{name}": round(value, 4) for name, value in measured.items()}


def write_figures(figures: Mapping[str, Any], path: Path | None) -> None:
    """Print figures as a line of JSON, and write them where ``--json`` said."""
    sys.stdout.write(json.dumps(figures) + "\n")
    write_json(path, figures)


def work_of(args: argparse.Namespace) -> Path:
    """Return the folder of finished parts, made if it is not there."""
    work: Path = args.work or Path(gettempdir()) / "trimoe-models-train"
    work.mkdir(parents=True, exist_ok=True)
    return work


def lessons_of(args: argparse.Namespace, say: Callable[[str], None]) -> list[Lesson]:
    """Return the lessons from generated data and the files of the arguments."""
    work = work_of(args)
    world = SimulationConfig(seed=args.seed)
    source = f"generated by apps/fraud/simulate.py, {world}"
    fraud = FraudLesson.of(simulate(world), source, work / "fraud", args.seed)
    say("fraud prepared")
    plant = FleetConfig(seed=args.seed)
    source = f"generated by apps/maintenance/simulate.py, {plant}"
    forecast = ForecastLesson.of(simulate_fleet(plant), source, work / "forecast", args.seed)
    say("forecast prepared")
    if args.organs:
        cases, source = read_cases(args.organs), "labelled CT volumes of OpenKBP (MIT licence)"
    else:
        cases, source = (
            make_cases(args.phantoms),
            f"{args.phantoms} phantoms of apps/imaging/phantom.py",
        )
    test = read_cases(args.organs_test) if args.organs_test else ()
    organs = OrganLesson(source, cases, VolumeSettings(workers=args.loaders), test)
    say("organs prepared")
    adrenal = [ShapeLesson.of(args.adrenal)] if args.adrenal else []
    return [fraud, forecast, organs, *adrenal]


def lean_lessons(lessons: Sequence[Lesson]) -> dict[str, list[Lesson]]:
    """Return lessons without special experts: no trees, and either kind of volume experts alone."""
    found: dict[str, list[Lesson]] = {}
    for left in ("local", "global"):
        found[left] = [_lean(each, left) for each in lessons]
    return found


def _lean(lesson: Lesson, left: str) -> Lesson:
    if isinstance(lesson, FraudLesson | ForecastLesson):
        return lesson.without_trees()
    if isinstance(lesson, OrganLesson):
        return lesson.with_experts(local=left == "local", global_=left == "global")
    return lesson


def progress_in(path: Path, say: Callable[[str], None]) -> Progress:
    """Return a callback that appends losses to a file, and says one line in a hundred steps."""

    def progress(step: int, steps: int, losses: Mapping[str, float]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **losses}) + "\n")
        if step % 100 == 0:
            said = ", ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
            say(f"step {step} of {steps}: {said}")

    return progress


def command_line() -> str:
    """Return the command that runs; of an absolute path, a machine's own, the name."""
    words = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return "trimoe " + shlex.join(words)
