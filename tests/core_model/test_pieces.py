"""A CT window in pieces: as many as its task says, and the answer of the whole."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch, offsets_from_lengths
from core_model.pieces import PiecedSequence, in_pieces
from core_model.volume import VolumeAdapter
from core_model.volume_tasks import (
    CHANNELS,
    LAST_SLABS,
    NUM_CASE,
    ORGAN_GRID,
    ORGANS_TASK,
    PATCH_VOXELS,
    SLABS,
    WindowGrid,
)
from core_model.voxels import VoxelHead

GRID = WindowGrid(2, 1, 6)  # as wide as slabs need, and small


@pytest.fixture(scope="module")
def model() -> Iterator[MoETransformer]:
    torch.manual_seed(0)
    with torch.inference_mode():
        model = MoETransformer(PRESETS["tiny"], ["organs"])
        model.adapters["organs"] = VolumeAdapter(model.config, GRID, CHANNELS)
        model.heads["organs"] = VoxelHead(model.config, GRID, CHANNELS, 3)
        yield model.eval()


def window(seed: int, kept: int) -> RaggedBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = NUM_CASE + kept
    hu = torch.randn(rows, PATCH_VOXELS, generator=generator) * 300.0
    chosen = torch.randperm(GRID.num_patches, generator=generator)[:kept].sort().values
    cell = torch.cat([GRID.num_patches + torch.arange(NUM_CASE), chosen]).int().unsqueeze(1)
    place = torch.randn(rows, 3, generator=generator) * 100.0
    return RaggedBatch(
        hu, offsets_from_lengths(torch.tensor([rows])), {"cell": cell, "place": place}
    )


def assert_same_answer(rows: Tensor, expected: Tensor) -> None:
    """Labels are equal, but for ties; confidence and share to the last bit of eight."""
    assert float((rows[:, :PATCH_VOXELS] == expected[:, :PATCH_VOXELS]).float().mean()) > 0.999
    difference = rows[:, PATCH_VOXELS:].int() - expected[:, PATCH_VOXELS:].int()
    assert int(difference.abs().max()) <= 1


def test_the_task_says_into_how_many_pieces_and_slabs_are_whole() -> None:
    assert ORGANS_TASK.pieces > 1
    assert all(4 * ORGAN_GRID.x % num == 0 for num in (SLABS, LAST_SLABS))


def test_as_many_pieces_as_the_task_says_answer_as_the_whole(model: MoETransformer) -> None:
    batch = window(1, kept=12)
    sequence = PiecedSequence(in_pieces(model, "organs", batch))
    num_pieces = ORGANS_TASK.pieces + model.config.num_layers + 1
    for _ in range(num_pieces - 1):
        sequence.advance()
    with pytest.raises(RuntimeError, match=f"after {num_pieces - 1} pieces"):
        sequence.complete()
    sequence.advance()
    output, whole = sequence.complete(), model({"organs": batch})
    assert_same_answer(output.outputs["organs"][0], whole.outputs["organs"][0])
    assert torch.equal(output.experts_LTK, whole.experts_LTK)
    assert torch.equal(output.cu_tokens, whole.cu_tokens)
