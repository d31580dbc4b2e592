"""A file in the layout of AdrenalMNIST3D, and small phantoms."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.imaging.phantom import PhantomShape, make_phantom
from apps.imaging.training.known import Known

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
def one_thread() -> Iterator[None]:
    """Sums of several threads end in the order in which they come: not the same bits each time."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)
