"""The trainings behind ``trimoe bench model --shared-vs-separate``; finished ones are reused.

shared       one block stack for all tasks
separate-T   task T alone, in a stack of the same size
dense        all tasks, one stack without routed experts whose tokens meet as many parameters
lean-local   all tasks without their special experts: no trees, local volume experts alone
lean-global  the same with global volume experts alone
loss         shared, experts balanced by an auxiliary loss in the place of their bias
unbalanced   shared, experts not balanced at all
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from apps.imaging.training.organ_lesson import OrganLesson
from apps.imaging.training.recorded import recorded
from apps.joint import Lesson, Plan, fit
from benchmarks.kernel_step_inputs import dense_of
from benchmarks.model_balance import Mix, routing_of

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

Figures = dict[str, Any]
GSHARD_WEIGHT = (
    0.01  # of the auxiliary loss, as DeepSeek-V2 weighs its expert-level one by .003 to .01
)
_LESSONS: dict[str, Sequence[Lesson]] = {}


class Lessons(NamedTuple):
    """What there is to learn.

    Args:
        whole: One of each task.
        lean: The same without special experts, by which volume experts are left.
    """

    whole: Sequence[Lesson]
    lean: Mapping[str, Sequence[Lesson]]


@dataclass(frozen=True, slots=True)
class Part:
    """One training.

    Args:
        name: See above.
        lessons: "whole" or a key of ``Lessons.lean``.
        tasks: Those of them that it learns.
        plan: How.
    """

    name: str
    lessons: str
    tasks: tuple[str, ...]
    plan: Plan

    @property
    def key(self) -> str:
        """Name and seed."""
        return f"{self.name}-{self.plan.seed}"


def parts_of(lessons: Lessons, plan: Plan, seeds: int) -> list[Part]:
    """Return all trainings, those of one seed after those of the other."""
    tasks = tuple(each.task for each in lessons.whole)
    found = []
    for seed in range(seeds):
        own = replace(plan, seed=seed)
        found += [Part("shared", "whole", tasks, own)]
        found += [Part(f"separate-{task}", "whole", (task,), own) for task in tasks]
        found += [Part("dense", "whole", tasks, replace(own, config=dense_of(plan.config)))]
        found += [Part(f"lean-{left}", left, tasks, own) for left in lessons.lean]
    settings = plan.settings
    by_loss = replace(settings, balance_loss=GSHARD_WEIGHT)
    found += [Part("loss", "whole", tasks, replace(plan, settings=by_loss))]
    free = replace(settings, bias_rate=0.0)
    found += [Part("unbalanced", "whole", tasks, replace(plan, settings=free))]
    return found


def train_part(part: Part) -> Figures:
    """Train once; return the metrics of each task and what the experts were chosen for."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    lessons = [each for each in _LESSONS[part.lessons] if each.task in part.tasks]
    model = fit(lessons, part.plan, _nothing, is_levelled=part.name != "unbalanced")
    metrics = {each.task: each.measure(model) for each in lessons}
    stack = sum(p.numel() for p in [*model.blocks.parameters(), model.final_norm])
    pointers = {p.data_ptr() for p in model.blocks.parameters()}
    figures: Figures = {"metrics": metrics, "stack_parameters": stack, "storages": len(pointers)}
    if part.name in ("shared", "loss", "unbalanced"):
        mix = Mix({each.task: routing_of(model, each) for each in lessons}, part.plan.config)
        figures["balance"] = mix.figures(part.plan.seed)
    return figures


def run_parts(
    parts: Sequence[Part], lessons: Lessons, jobs: int, work: Path, say: Callable[[str], None]
) -> dict[str, Figures]:
    """Return the figures of all trainings, several at once if asked; each is kept as it ends."""
    by_name = {"whole": lessons.whole, **lessons.lean}
    found = {
        part.key: json.loads(path.read_text("utf-8"))
        for part in parts
        if (path := _path(work, part)).exists()
    }
    missing = [part for part in parts if part.key not in found]
    for seed in sorted({part.plan.seed for part in missing}):
        own = [part for part in missing if part.plan.seed == seed]
        for part, figures in _trained(own, by_name, jobs, work):
            _path(work, part).write_text(json.dumps(figures), encoding="utf-8")
            found[part.key] = figures
            say(f"{part.key}: {figures['metrics']}")
    return found


def _trained(
    parts: Sequence[Part], lessons: Mapping[str, Sequence[Lesson]], jobs: int, work: Path
) -> Iterator[tuple[Part, Figures]]:
    """Yield the figures of trainings with one seed, those with the most tasks first."""
    if jobs < 2:
        _LESSONS.update(lessons)
        yield from ((part, train_part(part)) for part in parts)
        return
    fork = multiprocessing.get_context("fork")  # lessons are large, and CUDA has not begun here
    torch.set_num_threads(1)  # a team of threads does not survive the fork
    with _drawn(lessons, parts[0].plan, work) as given:
        _LESSONS.update(given)
        joined = fork.Value("i", 0)
        with ProcessPoolExecutor(jobs, fork, initializer=_join, initargs=(joined,)) as pool:
            order = sorted(parts, key=lambda part: -len(part.tasks))
            running = {pool.submit(train_part, part): part for part in order}
            for done in as_completed(running):
                yield running[done], done.result()


@contextmanager
def _drawn(
    lessons: Mapping[str, Sequence[Lesson]], plan: Plan, work: Path
) -> Iterator[Mapping[str, Sequence[Lesson]]]:
    """Give lessons whose CT windows of this seed are drawn already, once for all trainings."""
    organs = next((each for each in lessons["whole"] if isinstance(each, OrganLesson)), None)
    if organs is None:
        yield lessons
        return
    draw = organs.source("cpu", plan.seed).steps().__getitem__
    processes = len(os.sched_getaffinity(0))
    with recorded(draw, plan.settings.steps, work / "windows", processes) as folder:
        yield {
            name: [
                replace(each, windows=folder) if isinstance(each, OrganLesson) else each
                for each in group
            ]
            for name, group in lessons.items()
        }


def _join(joined: "Synchronized[int]") -> None:
    """Begin as one of several processes; they take the GPUs in turn."""
    with joined.get_lock():
        number, joined.value = joined.value, joined.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _path(work: Path, part: Part) -> Path:
    return work / f"{part.key}.json"


def _nothing(*_: object) -> None:
    """Say nothing."""
