"""Adrenal shapes in joint training: draws by number, the official split, and what is measured."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.imaging.training.adrenal import ShapeSettings, load_split
from apps.imaging.training.shape_lesson import ShapeLesson
from core_model.config import PRESETS
from core_model.joint import LoopSettings, train
from core_model.model import MoETransformer
from core_model.training import settle_norms

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's


@pytest.fixture
def lesson(adrenal_file: Path) -> ShapeLesson:
    settings = ShapeSettings(batch_size=8, peak_lr=4e-3)
    return replace(ShapeLesson.of(adrenal_file), settings=settings)


def test_what_a_step_draws_depends_on_its_number_alone(lesson: ShapeLesson) -> None:
    whole = [draw.batch.features for draw in islice(lesson.source("cpu", 5).draws(0), 9)]
    for start in (1, 4, 6):
        draws = islice(lesson.source("cpu", 5).draws(start), 9 - start)
        for draw, expected in zip(draws, whole[start:], strict=True):
            assert torch.equal(draw.batch.features, expected)


def test_a_shape_is_varied_anew_in_each_step(lesson: ShapeLesson) -> None:
    source = lesson.source("cpu", 5)
    alike = replace(source, masks=source.masks[:1].expand(8, 28, 28, 28))
    one, other = (draw.batch.features > 0 for draw in islice(alike.draws(0), 2))
    assert one.sum() == other.sum()  # and the case beside it
    assert not torch.equal(one, other)


def test_the_official_parts_have_their_roles(lesson: ShapeLesson, adrenal_file: Path) -> None:
    assert lesson.task == "adrenal"
    assert torch.equal(lesson.source("cpu", 5).masks, load_split(adrenal_file, "train")[0])
    assert [batch.num_sequences for batch in lesson.traffic("cpu")] == [32]
    assert [batch.num_sequences for batch in lesson.held_out("cpu")] == [12, 12]


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_maps")
def test_large_and_small_shapes_are_told_apart_on_the_test_part(
    lesson: ShapeLesson, tmp_path: Path, adrenal_file: Path
) -> None:
    torch.manual_seed(0)
    model = MoETransformer(PRESETS["tiny"], ["adrenal"])
    lesson.prepare(model)
    train(
        model, [lesson.source("cpu", 5)], LoopSettings(steps=24, average_decay=0.8), lambda *_: None
    )
    settle_norms(model, "adrenal", lesson.traffic("cpu"))
    lesson.finish(model, tmp_path)
    assert list(tmp_path.iterdir()) == [adrenal_file]
    found = lesson.measure(model)
    assert found["auc"] == 1.0
    assert found["acc"] > 0.9
    test = np.load(adrenal_file)
    other = adrenal_file.with_name("swapped.npz")
    swapped = {**test, "test_labels": 1 - test["test_labels"]}
    np.savez(other, allow_pickle=False, **swapped)
    assert ShapeLesson.of(other).measure(model)["auc"] == 0.0
