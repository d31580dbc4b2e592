"""Organs in joint training: draws, what is held out, and what is written and measured."""

import multiprocessing
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import core_model.joint
from apps.imaging.calibration import FILE, Calibration
from apps.imaging.resample import AIR_HU
from apps.imaging.segmentation import ORGANS
from apps.imaging.stack import SliceStack
from apps.imaging.training.adrenal import ShapeSettings
from apps.imaging.training.known import Known
from apps.imaging.training.loop import VolumeSettings
from apps.imaging.training.organ_lesson import OrganLesson
from apps.imaging.training.recorded import recorded
from apps.imaging.training.shape_lesson import ShapeLesson
from apps.imaging.windows import WindowPlan
from core_model.config import PRESETS
from core_model.joint import Draw, LoopSettings, Source, train
from core_model.model import MoETransformer
from core_model.training import settle_norms
from core_model.volume import NUM_LOCAL, VolumeAdapter
from core_model.voxels import VoxelHead

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's
ONE = VolumeSettings(batch_size=1, settling=2)


def lesson(cases: list[Known], settings: VolumeSettings = ONE) -> OrganLesson:
    return OrganLesson("generated", cases, settings)


def fresh(*tasks: str) -> MoETransformer:
    torch.manual_seed(0)
    return MoETransformer(PRESETS["tiny"], tasks)


def cube(hu: int) -> Known:
    """A case that is told by its density."""
    voxels = np.full((24, 24, 24), AIR_HU, dtype=np.int16)
    voxels[4:20, 4:20, 4:20] = hu
    origins = np.stack([np.zeros(24), np.zeros(24), 3.0 * np.arange(24)], axis=1)
    axes = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])
    stack = SliceStack(voxels, origins, *axes, (3.0, 3.0), np.zeros(24, dtype=np.bool_))
    return Known.of(stack, (voxels > AIR_HU).astype(np.uint8))


def assert_alike(one: Draw, other: Draw) -> None:
    assert torch.equal(one.batch.features, other.batch.features)
    assert torch.equal(one.batch.extras["cell"], other.batch.extras["cell"])
    assert one.weights_B.tolist() == other.weights_B.tolist() == [1.0] * one.batch.num_sequences


def test_the_windows_of_a_step_depend_on_its_number_alone(phantoms: list[Known]) -> None:
    source = lesson(phantoms).source("cpu", 3)
    before = torch.get_rng_state()
    whole = list(islice(source.draws(0), 3))
    assert_alike(next(source.draws(2)), whole[2])
    assert not torch.equal(whole[0].batch.features, whole[1].batch.features)
    assert torch.equal(torch.get_rng_state(), before)  # dropout of a resumed run hangs on it


@pytest.mark.slow
def test_processes_draw_the_same_in_order_and_end_with_the_iterator(phantoms: list[Known]) -> None:
    two = VolumeSettings(batch_size=1, workers=2)
    before = torch.get_rng_state()
    draws = lesson(phantoms, two).source("cpu", 3).draws(1)
    found = list(islice(draws, 4))
    assert len(multiprocessing.active_children()) == 2
    del draws
    assert multiprocessing.active_children() == []
    assert torch.equal(torch.get_rng_state(), before)
    for mine, other in zip(
        found, islice(lesson(phantoms).source("cpu", 3).draws(1), 4), strict=True
    ):
        assert_alike(mine, other)


def test_what_is_held_out_is_never_trained_on() -> None:
    cases = [cube(100 * i) for i in range(1, 21)]
    whole = lesson(cases, VolumeSettings(batch_size=3, settling=10))
    held = [round(batch.features.amax().item()) for batch in lesson(cases).held_out("cpu")]
    traffic = list(whole.traffic("cpu"))
    brightest = [hu for batch in traffic for hu in batch.features.amax(dim=1).tolist()]
    seen = {round(hu) for hu in brightest} - {AIR_HU}
    assert len(set(held)) == 2  # a tenth
    assert seen.isdisjoint(held)
    assert len(seen) == 18
    trained_on = {int(volume.hu.max()) for volume in whole.source("cpu", 3).volumes}
    assert trained_on.isdisjoint(held)
    assert len(trained_on) == 18


def test_every_window_of_a_case_is_served_once(phantoms: list[Known]) -> None:
    whole = lesson(phantoms, VolumeSettings(batch_size=5))
    held, traffic = list(whole.held_out("cpu")), list(whole.traffic("cpu"))
    num_held, num_seen = (sum(each.num_sequences for each in part) for part in (held, traffic))
    windows = [len(WindowPlan(case.hu).corners) for case in phantoms]
    assert num_held in set(windows)
    assert num_held + num_seen == sum(windows)
    assert all(batch.num_sequences <= 5 for batch in (*held, *traffic))


def test_experts_that_are_left_out_have_no_say(phantoms: list[Known]) -> None:
    model = fresh("organs")
    lesson(phantoms).with_experts(local=False, global_=True).prepare(model)
    adapter = model.adapters["organs"]
    assert isinstance(adapter, VolumeAdapter)
    gates = adapter._gates(torch.randn(5, adapter.gate.in_features))
    assert gates[:, :NUM_LOCAL].abs().max() == 0.0
    assert gates.sum(dim=1).tolist() == pytest.approx([1.0] * 5)


@pytest.mark.usefixtures("small_windows", "one_thread")
def test_windows_that_are_drawn_ahead_are_those_of_the_steps(
    phantoms: list[Known], tmp_path: Path
) -> None:
    own = lesson(phantoms)
    source = own.source("cpu", 3)
    with recorded(source.steps().__getitem__, 3, tmp_path / "windows", 2) as folder:
        ahead = replace(own, windows=folder).source("cpu", 3)
        for drawn, read in zip(islice(source.draws(0), 3), islice(ahead.draws(0), 3), strict=True):
            assert_alike(read, drawn)
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("small_windows", "one_thread")
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    phantoms: list[Known], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adrenal_file: Path
) -> None:
    monkeypatch.setattr(core_model.joint, "SAVE_EVERY", 1)
    monkeypatch.setattr(core_model.joint, "SAY_EVERY", 1)
    organs = lesson(phantoms, VolumeSettings(batch_size=1, workers=1))
    shapes = replace(ShapeLesson.of(adrenal_file), settings=ShapeSettings(batch_size=2))
    sources: list[Source] = [organs.source("cpu", 3), shapes.source("cpu", 0)]
    whole, settings = fresh("organs", "adrenal"), LoopSettings(steps=3)
    train(whole, sources, settings, lambda *_: None)

    def cut(step: int, *_: object) -> None:
        if step == 1:
            raise KeyboardInterrupt

    keep = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train(fresh("organs", "adrenal"), sources, settings, cut, keep)
    torch.manual_seed(1)  # whatever the next process starts with
    again = MoETransformer(PRESETS["tiny"], ["organs", "adrenal"])
    steps: list[int] = []
    train(again, sources, settings, lambda step, *_: steps.append(step), keep)
    assert steps == [1, 2]
    expected = whole.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in again.state_dict().items())


@pytest.mark.slow
@pytest.mark.usefixtures("small_windows")
def test_organs_and_shapes_are_learnt_in_the_same_steps(
    phantoms: list[Known], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adrenal_file: Path
) -> None:
    monkeypatch.setattr(core_model.joint, "SAY_EVERY", 1)
    organs = lesson(
        phantoms, VolumeSettings(batch_size=1, peak_lr=1e-2, organ_share=1.0, settling=1)
    )
    shapes = replace(
        ShapeLesson.of(adrenal_file), settings=ShapeSettings(batch_size=8, peak_lr=4e-3)
    )
    model, said = fresh("organs", "adrenal"), list[Mapping[str, float]]()
    lessons = (organs, shapes)
    for each in lessons:
        each.prepare(model)
    sources: list[Source] = [organs.source("cpu", 3), shapes.source("cpu", 0)]
    train(model, sources, LoopSettings(steps=8), lambda _s, _n, losses: said.append(losses))
    for task in ("organs", "adrenal"):
        first, last = ([losses[task] for losses in part] for part in (said[:2], said[-2:]))
        assert np.mean(last) < 0.9 * np.mean(first)

    for each in lessons:
        settle_norms(model, each.task, each.traffic("cpu"))
        each.finish(model, tmp_path)
    calibration = Calibration.load(tmp_path / FILE)
    assert set(calibration.least_sure) == set(ORGANS)
    head = model.heads["organs"]
    assert isinstance(head, VoxelHead)
    assert head.temperature.item() != 1.0
    found = organs.measure(model)
    organ = {name: value for name, value in found.items() if name != "dice_mean"}
    assert set(organ) == {f"dice_{name}" for name in ORGANS}
    assert found["dice_mean"] == pytest.approx(np.mean(list(organ.values())))
    assert set(shapes.measure(model)) == {"auc", "acc"}
