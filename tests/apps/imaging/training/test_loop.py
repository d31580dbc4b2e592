"""Organ training: windows with their truth, the loss, and that something is learned."""

import numpy as np
import pytest
import torch

from apps.imaging.training.adrenal import pack_shapes
from apps.imaging.training.known import Known
from apps.imaging.training.loop import (
    WINDOWS_EACH,
    Volume,
    VolumeSettings,
    WindowDraws,
    collate,
    dice_and_entropy,
    draw_at,
    infer_labels,
    only_known,
    organ_adapter,
    organ_dice,
    to_device,
    train_volumes,
    vary_density,
    vary_shape,
    voxel_logits,
)
from apps.imaging.windows import PATCH, WINDOW, WindowPlan, from_patches
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.voxels import VoxelHead


@pytest.fixture
def volume(phantoms: list[Known]) -> Volume:
    return phantoms[0].volume


def test_the_truth_of_a_window_lies_where_its_voxels_do(volume: Volume) -> None:
    marked = Volume(volume.hu, (np.abs(volume.hu) % 7).astype(np.uint8))
    plan = WindowPlan(marked.hu.astype(np.float32))
    for corner in plan.corners:
        rows, target, _ = draw_at(plan, marked.labels, corner)
        cell = rows["cell"][:, 0].numpy()
        own = cell < np.prod(WINDOW)
        cells = np.full((int(np.prod(WINDOW)), PATCH**3), np.nan, dtype=np.float32)
        cells[cell[own]] = rows["hu"].numpy()[own]
        hu = from_patches(cells, WINDOW)
        known = np.isfinite(hu) & (hu > -1000)
        np.testing.assert_array_equal(target.numpy()[known], np.abs(hu[known]).astype(int) % 7)


def test_windows_that_aim_at_organs_hold_one(volume: Volume) -> None:
    draws = WindowDraws([volume], VolumeSettings(organ_share=1.0), seed=0)
    rng = np.random.default_rng(0)
    windows = [each.labels for _ in range(4) for each in draws.draw(rng)]
    assert len(windows) == 4 * WINDOWS_EACH
    assert all(int(labels.amax()) > 0 for labels in windows)


def test_a_case_that_lies_otherwise_keeps_its_organs_where_their_tissue_is() -> None:
    hu = np.full((40, 48, 56), 0, dtype=np.int16)
    labels = np.zeros(hu.shape, dtype=np.uint8)
    hu[10:20, 12:30, 8:20], labels[10:20, 12:30, 8:20] = 1000, 3
    rng = np.random.default_rng(3)
    for _ in range(4):
        varied, moved = vary_shape(Volume(hu, labels), rng)
        assert varied.shape == moved.shape == tuple(n + PATCH for n in hu.shape)
        assert set(np.unique(moved)) == {0, 3}
        assert 0.6 < (moved == 3).sum() / (labels == 3).sum() < 1.5
        assert np.median(varied[moved == 3]) == pytest.approx(1000.0)
        assert (varied[(moved == 0) & (varied > -1000)] < 600).mean() > 0.98


def test_variation_leaves_air_alone() -> None:
    rng = np.random.default_rng(0)
    hu = np.full((8, 8, 8), -1024.0, dtype=np.float32)
    hu[2:6] = 50.0
    varied = vary_density(hu, rng)
    np.testing.assert_array_equal(varied[hu == -1024], -1024)
    assert (varied[2:6] != 50).mean() > 0.9


def test_the_loss_is_least_for_the_truth() -> None:
    labels = torch.zeros(1, 8, 8, 8, dtype=torch.long)
    labels[0, 2:5] = 2
    right = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float() * 20
    wrong = right.roll(1, 1)
    assert float(dice_and_entropy(right, labels)) < 0.01
    assert float(dice_and_entropy(wrong, labels)) > 1.0


def test_an_organ_that_was_not_contoured_is_neither_right_nor_wrong() -> None:
    labels = torch.zeros(2, 4, 4, 4, dtype=torch.long)
    labels[:, 1] = 1
    known = torch.tensor([[True, True, False], [True, True, True]])
    truth = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float() * 20
    said_so = truth.clone()
    said_so[0, :, 3] = torch.tensor([0.0, 0.0, 20.0]).view(3, 1, 1)  # where nobody looked
    assert torch.equal(said_so[1], truth[1])
    assert float(dice_and_entropy(only_known(said_so, known), labels)) < 0.01
    assert float(dice_and_entropy(said_so, labels)) > 1.0
    probs = torch.softmax(only_known(torch.randn(2, 3, 4, 4, 4), known), dim=1)
    assert float(probs[0, 2].max()) == 0.0
    assert torch.allclose(probs.sum(1), torch.ones(2, 4, 4, 4))


def test_a_window_says_which_labels_are_known_in_its_case(volume: Volume) -> None:
    partial = np.where(volume.labels == 3, 0, volume.labels).astype(np.uint8)
    plan = WindowPlan(volume.hu.astype(np.float32))
    found = draw_at(plan, partial, plan.corners[0]).known.tolist()
    assert found == [True, *(bool((partial == i).any()) for i in range(1, 8))]
    assert not found[3]


def test_dice_counts_contoured_organs_alone() -> None:
    truth = np.zeros((4, 4, 4), dtype=np.uint8)
    truth[:2], truth[3] = 1, 7
    said = truth.copy()
    said[1], said[2] = 0, 2
    dice = organ_dice(said, truth)
    assert dice[[0, 6]].tolist() == pytest.approx([2 / 3, 1.0])
    assert np.isnan(dice[1:6]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["organs", "adrenal"])
def test_only_what_trains_organs_on_cuda_is_narrowed(volume: Volume, task: str) -> None:
    model = MoETransformer(PRESETS["tiny"], [task]).cuda()
    if task == "organs":
        organ_adapter(model).narrow_training()
        draws = WindowDraws([volume], VolumeSettings(), seed=1)
        batch, _, _ = to_device(collate(list(draws.draw(np.random.default_rng(0)))), "cuda")
    else:
        batch = pack_shapes(torch.ones(2, 28, 28, 28, dtype=torch.bool, device="cuda"))

    def kind_of_maps() -> torch.dtype:
        step = model.encode_and_run({task: batch})
        assert step.pieces[task].dtype == torch.float32
        if task == "organs":
            head = model.heads[task]
            assert isinstance(head, VoxelHead)
            full, _ = head.decode(step.pieces[task], step.encoded[task])
            assert full.dtype == step.encoded[task].side["half"].dtype
        return step.encoded[task].side["half"].dtype

    trained = torch.bfloat16 if task == "organs" else torch.float32
    assert kind_of_maps() == trained
    with torch.no_grad():  # as norms are settled
        assert kind_of_maps() == torch.float32
    model.eval()
    assert kind_of_maps() == torch.float32


@pytest.mark.slow
@pytest.mark.usefixtures("small_windows")
def test_a_few_steps_lower_the_loss_and_labels_fit_the_case(volume: Volume) -> None:
    torch.manual_seed(0)
    model = MoETransformer(PRESETS["tiny"], ["organs"])
    draws = WindowDraws([volume], VolumeSettings(), seed=1)
    batch, labels, _ = to_device(collate(list(draws.draw(np.random.default_rng(5)))), "cpu")

    def loss() -> float:
        with torch.no_grad():
            return float(dice_and_entropy(voxel_logits(model.train(), batch)[0], labels))

    before = loss()
    settings = VolumeSettings(steps=10, batch_size=1, peak_lr=6e-3, average_decay=0.5, settling=3)
    train_volumes(model, [volume], settings, 0, lambda *_: None)
    assert loss() < 0.95 * before
    said, sure, share = infer_labels(model.eval(), volume.hu.astype(np.float32))
    assert said.shape == sure.shape == share.shape == volume.hu.shape
    assert said.max() <= 7
