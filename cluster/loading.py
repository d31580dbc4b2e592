"""From a model on disk to something that runs steps: the one place that loads weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import CheckpointError
from cluster.registry import find_model
from cluster.step import StepRunner
from core_model.tasks import registered_tasks


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model version, ready to run."""

    runner: StepRunner
    version: str


Load = Callable[[], LoadedModel]


def load_model(models_dir: Path, name: str | None = None, device: str = "cpu") -> LoadedModel:
    """Verify and load a model of a directory (see ``cluster.registry.find_model``).

    Raises:
        CheckpointError: Missing, altered or of another shape than its configuration.
    """
    entry = find_model(models_dir, name)
    entry.verify()
    return load_checkpoint(entry.path, device)


def load_checkpoint(path: Path, device: str = "cpu") -> LoadedModel:
    """Load the model of one checkpoint directory.

    Raises:
        CheckpointError: As above.
    """
    from core_model import checkpoint  # noqa: PLC0415 - torch and weights only where they run

    try:
        model, manifest = checkpoint.load_checkpoint(path, device=device)
    except checkpoint.CheckpointError as error:
        raise CheckpointError(str(error)) from error
    registry = registered_tasks()
    runner = StepRunner(
        model=model,
        tasks={task: registry[task] for task in manifest.tasks},
        num_experts=model.config.num_experts,
        device=device,
    )
    return LoadedModel(runner, manifest.version)
