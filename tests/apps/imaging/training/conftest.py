"""A file in the layout of AdrenalMNIST3D, small phantoms, and small models of volumes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.imaging.phantom import PhantomShape, make_phantom
from apps.imaging.training.known import Known
from core_model import volume_tasks
from core_model.tasks import registered_tasks

SMALL = PhantomShape(slices=40, pixels=64, slice_mm=6.0, pixel_mm=6.4, noise_hu=10.0)


@pytest.fixture
def adrenal_file(tmp_path: Path) -> Path:
    """Large and small boxes, in the layout of the benchmark."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, num in (("train", 32), ("val", 12), ("test", 12)):
        masks = np.zeros((num, 28, 28, 28), dtype=np.uint8)
        classes = np.arange(num) % 2
        for mask, large in zip(masks, classes, strict=True):
            low, edge = rng.integers(4, 8, 3), 10 if large else 4
            mask[tuple(slice(a, a + edge) for a in low)] = 255
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = masks, classes[:, None]
    path = tmp_path / "adrenalmnist3d.npz"
    np.savez(path, allow_pickle=False, **arrays)
    return path


@pytest.fixture(scope="session")
def phantoms() -> list[Known]:
    """Three cases."""
    return [Known.of(*make_phantom(seed, SMALL)) for seed in range(3)]


@pytest.fixture
def narrow_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the channels: training on shapes takes three fifths of the time."""
    monkeypatch.setattr(volume_tasks, "CHANNELS", volume_tasks.Channels(8, 16, 32))


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of organs with an eighth of the voxels, in training, serving and model."""
    grid = volume_tasks.WindowGrid(6, 6, 6)
    for module in ("apps.imaging.windows", "apps.imaging.training.loop"):
        monkeypatch.setattr(f"{module}.WINDOW", tuple(grid))
    monkeypatch.setattr("apps.imaging.training.calibrate.VOXELS_EACH", 2_500)
    usual = volume_tasks.ORGANS_TASK
    small = volume_tasks._task(usual.name, grid, usual.outputs, 1 + len(volume_tasks.ORGANS))
    found = {**registered_tasks(), small.name: small}
    monkeypatch.setattr("core_model.model.registered_tasks", lambda: found)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of several threads end in the order in which they come: not the same bits each time."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)
