"""Volume adapter and heads: layouts, independence of windows, experts and their gate."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch, offsets_from_lengths
from core_model.volume import NUM_LOCAL, VolumeAdapter
from core_model.volume_tasks import CHANNELS, NUM_CASE, PATCH, PATCH_VOXELS, SHAPE_GRIDS, WindowGrid
from core_model.voxels import VoxelHead, patch_rows, spread_pairs

GRID = SHAPE_GRIDS["adrenal"]


@pytest.fixture(scope="module")
def model() -> Iterator[MoETransformer]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield MoETransformer(PRESETS["tiny"], ["adrenal"]).eval()


def window(seed: int, kept: int = GRID.num_patches) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a window: the case's, then ``kept`` patches of random tissue."""
    generator = torch.Generator().manual_seed(seed)
    hu = torch.randn(NUM_CASE + kept, PATCH_VOXELS, generator=generator) * 200.0
    chosen = torch.randperm(GRID.num_patches, generator=generator)[:kept].sort().values
    cell = torch.cat([GRID.num_patches + torch.arange(NUM_CASE), chosen]).int().unsqueeze(1)
    return hu, cell, torch.randn(NUM_CASE + kept, 3, generator=generator) * 100.0


def pack(*parts: tuple[Tensor, Tensor, Tensor]) -> RaggedBatch:
    hu, cell, place = (torch.cat(each) for each in zip(*parts, strict=True))
    lengths = torch.tensor([part[0].shape[0] for part in parts])
    return RaggedBatch(hu, offsets_from_lengths(lengths), {"cell": cell, "place": place})


def test_windows_of_a_step_do_not_touch_each_other(model: MoETransformer) -> None:
    windows = [window(1), window(2, kept=20), window(3, kept=1)]
    together = model({"adrenal": pack(*windows)}).outputs["adrenal"][0]
    alone = torch.cat([model({"adrenal": pack(w)}).outputs["adrenal"][0] for w in windows])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_voxels_reach_the_map_where_they_lie() -> None:
    """A patch that is told apart lights up its own cells of the map of pairs, and no others."""
    adapter = VolumeAdapter(PRESETS["tiny"], GRID, CHANNELS).eval()
    scaled = torch.zeros(1, 2, PATCH, PATCH, PATCH)
    scaled[0, 1, 5, 2, 7] = 3.0
    spot = torch.tensor([GRID.num_patches + 1 * 16 + 2 * 4 + 3])  # window 1, patch z 1, y 2, x 3
    map_ = adapter._pairs(scaled.flatten(2), spot, 2)
    where = (map_ == map_.max()).nonzero()
    channel = 1 * 8 + (5 % 2) * 4 + (2 % 2) * 2 + 7 % 2
    expected = [[1, channel, (8 + 5) // 2, (16 + 2) // 2, (24 + 7) // 2]]
    assert where.tolist() == expected


def test_pairs_spread_to_voxels_in_the_order_in_which_they_were_packed() -> None:
    volume = torch.randn(2, 3, 8, 8, 8)
    parts = volume.view(2, 3, 4, 2, 4, 2, 4, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
    assert torch.equal(spread_pairs(parts.reshape(2, 24, 4, 4, 4), 3), volume)


def test_rows_of_patches_follow_the_cells() -> None:
    grid = WindowGrid(2, 1, 3)
    volume = torch.arange(2 * 16 * 8 * 24).view(2, 16, 8, 24)
    rows = patch_rows(volume, grid)
    assert torch.equal(rows[1 * 6 + 1 * 3 + 2], volume[1, 8:, :, 16:].flatten())


@pytest.mark.parametrize(("local", "global_", "share"), [(True, False, 1.0), (False, True, 0.0)])
def test_one_kind_of_expert_can_be_left_out(local: bool, global_: bool, share: float) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        model = MoETransformer(PRESETS["tiny"], ["adrenal"]).eval()
        adapter = model.adapters["adrenal"]
        assert isinstance(adapter, VolumeAdapter)
        batch = pack(window(1))
        both = model({"adrenal": batch}).outputs["adrenal"][0]
        assert 0.05 < float(both[0, 1]) < 0.95
        adapter.use_experts(local=local, global_=global_)
        alone = model({"adrenal": batch}).outputs["adrenal"][0]
        assert float(alone[0, 1]) == pytest.approx(share)
        silenced = adapter.local if not local else adapter.relations
        for parameter in silenced.parameters():
            parameter.zero_()
        torch.testing.assert_close(model({"adrenal": batch}).outputs["adrenal"][0], alone)


def test_the_whole_case_is_seen_from_every_window(model: MoETransformer) -> None:
    hu, cell, place = window(5)
    other = hu.clone()
    other[:NUM_CASE] += 300.0
    first = model({"adrenal": pack((hu, cell, place))}).outputs["adrenal"][0]
    second = model({"adrenal": pack((other, cell, place))}).outputs["adrenal"][0]
    assert float((first - second).abs()[0, 0]) > 1e-4


def test_a_voxel_head_answers_each_patch_with_label_confidence_and_share() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        adapter = VolumeAdapter(PRESETS["tiny"], GRID, CHANNELS).eval()
        head = VoxelHead(PRESETS["tiny"], GRID, CHANNELS, 4).eval()
        encoded = adapter(pack(window(1, kept=20), window(2, kept=7)))
        rows, offsets = head(encoded.tokens_TD, encoded)
        logits, _ = head.decode(encoded.tokens_TD, encoded)
    assert rows.dtype == torch.uint8
    assert offsets.tolist() == [0, 20, 27]
    spot = encoded.side["spot"]
    shares = torch.softmax(logits, dim=1)
    label = patch_rows(shares.argmax(1), GRID)[spot]
    sure = patch_rows(shares.amax(1), GRID)[spot]
    assert torch.equal(rows[:, :PATCH_VOXELS].long(), label)
    torch.testing.assert_close(rows[:, PATCH_VOXELS:-1] / 255.0, sure, atol=0.003, rtol=0)
    torch.testing.assert_close(
        rows[:, -1:] / 255.0, encoded.side["local_share"], atol=0.003, rtol=0
    )


def test_a_flatter_temperature_lowers_confidence_and_moves_no_label() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        adapter = VolumeAdapter(PRESETS["tiny"], GRID, CHANNELS).eval()
        head = VoxelHead(PRESETS["tiny"], GRID, CHANNELS, 4).eval()
        encoded = adapter(pack(window(1)))
        before, _ = head(encoded.tokens_TD, encoded)
        head.temperature.fill_(3.0)
        after, _ = head(encoded.tokens_TD, encoded)
    assert torch.equal(before[:, :PATCH_VOXELS], after[:, :PATCH_VOXELS])
    assert float(after[:, PATCH_VOXELS:-1].float().mean()) < float(
        before[:, PATCH_VOXELS:-1].float().mean()
    )


def test_there_are_as_many_gates_as_experts() -> None:
    adapter = VolumeAdapter(PRESETS["tiny"], GRID, CHANNELS)
    assert adapter.gate.out_features == len(adapter.local) + len(adapter.relations)
    assert len(adapter.local) == NUM_LOCAL
