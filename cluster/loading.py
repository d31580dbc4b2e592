"""From a registry to something that runs steps: the one place that loads weights."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from cluster.errors import CheckpointError, ConfigurationError
from cluster.registry import Registry
from cluster.step import StepRunner
from cluster.versions import Aliases
from core_model.tasks import registered_tasks


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model version, ready to run."""

    runner: StepRunner
    version: str


class ModelSource(Protocol):
    """Where a replica gets its models; called in threads, picklable before its first use."""

    def aliases(self) -> Aliases:
        """Return what is to be served now."""
        ...

    def load(self, version: str) -> LoadedModel:
        """Load a version.

        Raises:
            CheckpointError: Missing, altered or of another shape than its configuration.
        """
        ...


@dataclass(frozen=True, slots=True)
class RegistrySource:
    """Models of a registry, as its aliases say.

    Args:
        registry: Where they are.
        device: Where they run.
        pinned: Name or version to serve whatever the aliases say.
    """

    registry: Registry
    device: str = "cpu"
    pinned: str | None = None

    def aliases(self) -> Aliases:
        """Return what is to be served now (see ``ModelSource``)."""
        if self.pinned is not None:
            return Aliases(stable=self.registry.find(self.pinned).version)
        return self.registry.aliases()

    def load(self, version: str) -> LoadedModel:
        """Verify and load a version (see ``ModelSource``)."""
        return load_checkpoint(self.registry.fetch(version).path, self.device)


@dataclass(slots=True)
class OneModel:
    """A single model that is made on first use, for tests and measurements."""

    make: Callable[[], LoadedModel]
    _made: LoadedModel | None = field(default=None, init=False)

    def aliases(self) -> Aliases:
        """Return its version as stable."""
        return Aliases(stable=self._model().version)

    def load(self, version: str) -> LoadedModel:
        """Return it."""
        return self._model()

    def __reduce__(self) -> tuple[type["OneModel"], tuple[Callable[[], LoadedModel]]]:
        """Travel without the model: Serve pickles the arguments of a replica that runs."""
        return OneModel, (self.make,)

    def _model(self) -> LoadedModel:
        if self._made is None:
            self._made = self.make()
        return self._made


def apart(load: Callable[[], LoadedModel]) -> LoadedModel:
    """Load in a thread that ends then, and takes its OpenMP team with it.

    Each thread that computes gets a team of its own; as soon as there are more team threads
    than cores, GNU's OpenMP stops spinning in all of them and a CPU step takes twice as long
    (docs/log.md#teams).  So only the thread of the steps may have a team that stays.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
        return loader.submit(load).result()


def kernels_setting() -> str:
    """Return what $TRIMOE_KERNELS says in this process: "auto", or "torch" for no Triton.

    Raises:
        ConfigurationError: Neither.
    """
    from kernels.dispatch import environment_impl  # noqa: PLC0415 - torch only where it runs

    try:
        return environment_impl()
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def load_checkpoint(path: Path, device: str = "cpu") -> LoadedModel:
    """Load the model of one checkpoint directory.

    Raises:
        CheckpointError: As above.
        ConfigurationError: See ``kernels_setting``.
    """
    kernels_setting()
    from core_model import checkpoint, graphs  # noqa: PLC0415 - torch only where it runs

    try:
        model, manifest = checkpoint.load_checkpoint(path, device=device)
    except checkpoint.CheckpointError as error:
        raise CheckpointError(str(error)) from error
    if device != "cpu":
        model.graphs = graphs.captured_blocks(model)
    tasks = {task: registered_tasks()[task] for task in manifest.tasks}
    if device != "cpu":  # where a sequence takes milliseconds, whole
        tasks = {task: replace(spec, pieces=1) for task, spec in tasks.items()}
    runner = StepRunner(
        model=model,
        tasks=tasks,
        num_experts=model.config.num_experts,
        num_layers=model.config.num_layers,
        device=device,
    )
    return LoadedModel(runner, manifest.version)
