"""A CT window in pieces: as many as its task says, and the answer of the whole."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch, offsets_from_lengths
from core_model.pieces import PiecedSequence
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


def begin(model: MoETransformer, batch: RaggedBatch) -> PiecedSequence:
    adapter, head = model.adapters["organs"], model.heads["organs"]
    assert isinstance(adapter, VolumeAdapter)
    assert isinstance(head, VoxelHead)
    sequence = PiecedSequence("organs", adapter, head, batch)
    while not sequence.is_before_blocks:
        sequence.advance()
    return sequence


def finish(sequence: PiecedSequence) -> tuple[Tensor, Tensor, Tensor]:
    while sequence.num_done < ORGANS_TASK.pieces:
        sequence.advance()
    (rows, _), experts, cu_tokens = sequence.complete()
    return rows, experts, cu_tokens


def assert_same_answer(rows: Tensor, expected: Tensor) -> None:
    """Labels are equal, but for ties; confidence and share to the last bit of eight."""
    assert float((rows[:, :PATCH_VOXELS] == expected[:, :PATCH_VOXELS]).float().mean()) > 0.999
    difference = rows[:, PATCH_VOXELS:].int() - expected[:, PATCH_VOXELS:].int()
    assert int(difference.abs().max()) <= 1


def test_the_task_says_into_how_many_pieces_and_slabs_are_whole() -> None:
    assert ORGANS_TASK.pieces > 1
    assert all(4 * ORGAN_GRID.x % num == 0 for num in (SLABS, LAST_SLABS))


def test_windows_that_pass_the_blocks_together_answer_as_each_whole(model: MoETransformer) -> None:
    batches = [window(1, kept=12), window(2, kept=5)]
    sequences = [begin(model, batch) for batch in batches]
    encoded = [each.encoded for each in sequences if each.encoded is not None]
    assert len(encoded) == len(sequences)
    tokens, experts = model.run_encoded([("organs", each) for each in encoded])
    chosen = experts.split([piece.shape[0] for piece in tokens], dim=1)
    for sequence, batch, piece, own in zip(sequences, batches, tokens, chosen, strict=True):
        sequence.pass_blocks(piece, own)
        rows, found, cu_tokens = finish(sequence)
        whole = model({"organs": batch})
        assert_same_answer(rows, whole.outputs["organs"][0])
        assert torch.equal(found, whole.experts_LTK)
        assert torch.equal(cu_tokens, whole.cu_tokens)


def test_an_answer_before_the_last_piece_is_an_error(model: MoETransformer) -> None:
    sequence = begin(model, window(3, kept=4))
    with pytest.raises(RuntimeError, match=f"after {sequence.num_done} pieces"):
        sequence.complete()
