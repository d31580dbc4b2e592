"""AdrenalMNIST3D as windows: nothing of a mask is lost, and eight mirror images are eight."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.imaging.training.adrenal import (
    FLIPS,
    TISSUE_HU,
    ShapeSettings,
    load_split,
    pack_shapes,
    score_shapes,
    train_shapes,
    vary_shapes,
)
from apps.imaging.windows import CASE_EDGE, PATCH, from_patches
from core_model.config import PRESETS
from core_model.model import MoETransformer


def masks(num: int, size: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(num, size, size, size, dtype=torch.bool)
    low = torch.randint(6, 10, (num, 3), generator=generator)
    for i, (z, y, x) in enumerate(low.tolist()):
        found[i, z : z + 7, y : y + 5, x : x + 9] = True
    return found


def test_the_rows_of_a_window_hold_the_mask_and_its_place() -> None:
    shapes = masks(3)
    batch = pack_shapes(shapes)
    starts = batch.cu_seqlens.tolist()
    for i, (start, end) in enumerate(pairwise(starts)):
        cell = batch.extras["cell"][start:end, 0].numpy()
        own = cell < 64
        assert 0 < (~own).sum() < CASE_EDGE**3
        assert (np.diff(cell[~own]) > 0).all()
        assert (batch.features[start:end] == TISSUE_HU).any(dim=1).sum() >= own.sum() > 0
        cells = np.full((64, PATCH**3), -1024.0, dtype=np.float32)
        cells[cell[own]] = batch.features[start:end][own].numpy()
        volume = from_patches(cells, (4, 4, 4))[2:30, 2:30, 2:30]
        np.testing.assert_array_equal(volume == TISSUE_HU, shapes[i].numpy())


def test_variation_moves_and_mirrors_and_loses_nothing() -> None:
    shapes = masks(16)
    varied = vary_shapes(shapes, 2, torch.Generator().manual_seed(1))
    assert torch.equal(varied.sum((1, 2, 3)), shapes.sum((1, 2, 3)))
    assert not torch.equal(varied, shapes)


def test_there_are_eight_mirror_images() -> None:
    corner = torch.zeros(1, 4, 4, 4)
    corner[0, 0, 1, 2] = 1.0
    assert len({tuple(corner.flip(axes).flatten().tolist()) for axes in FLIPS}) == 8


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_maps")
def test_large_and_small_shapes_are_learned_apart() -> None:
    small, large = masks(24), masks(24)
    large |= large.roll(5, 1) | large.roll(-4, 2)
    shapes = torch.cat([small, large])
    classes = torch.cat([torch.zeros(24), torch.ones(24)])
    torch.manual_seed(0)
    model = MoETransformer(PRESETS["tiny"], ["adrenal"])
    settings = ShapeSettings(epochs=5, batch_size=12, peak_lr=2e-3, average_decay=0.8)
    train_shapes(model, shapes, classes, settings, 0, lambda *_: None)
    for flips in (False, True):
        logits = score_shapes(model, shapes, flips=flips)
        assert ((logits > 0) == (classes > 0.5)).float().mean() > 0.9


def test_a_file_without_the_part_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", images=np.zeros(2))
    with pytest.raises(ValueError, match=r"other.npz: expected test_images"):
        load_split(tmp_path / "other.npz", "test")
