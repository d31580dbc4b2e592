"""Windows cover the body once and more; answers put back give what was asked about."""

import numpy as np
import pytest

from apps.imaging import segmentation, windows
from apps.imaging.phantom import make_phantom
from apps.imaging.resample import PatientGrid
from apps.imaging.windows import PATCH, WINDOW, Canvas, WindowPlan, body_box, shrink_case
from core_model import volume_tasks


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    stack, _ = make_phantom(3)
    return PatientGrid(stack, 3.0).sample()


def test_both_sides_of_the_wire_mean_the_same() -> None:
    assert windows.PATCH == volume_tasks.PATCH
    assert windows.CASE_EDGE == volume_tasks.CASE_EDGE
    assert tuple(windows.WINDOW) == tuple(volume_tasks.ORGAN_GRID)
    assert segmentation.ORGANS == volume_tasks.ORGANS


def test_answers_that_repeat_the_question_give_it_back(hu: np.ndarray) -> None:
    """The label of a voxel is made from its density; every voxel of the body must come back."""
    plan = WindowPlan(hu)
    canvas = Canvas(plan, hu.shape, 8)
    for corner in plan.corners:
        window = plan.cut(corner)
        rows = window.hu[window.cell[:, 0] < np.prod(WINDOW)]
        labels = label_of(rows)
        answer = np.concatenate(
            [labels, np.full_like(labels, 200), np.full((len(rows), 1), 77, np.uint8)], axis=1
        )
        canvas.add(window, answer)
    labels, sure, share = canvas.join()
    tissue = np.zeros(hu.shape, dtype=bool)
    tissue[plan.body] = (hu > windows.BODY_HU)[plan.body]
    np.testing.assert_array_equal(labels[tissue], label_of(hu)[tissue])
    assert set(np.unique(sure[tissue])) == {200}
    assert set(np.unique(share[tissue])) == {77}


def label_of(hu: np.ndarray) -> np.ndarray:
    found: np.ndarray = (np.abs(hu).astype(np.int64) % 8).astype(np.uint8)
    return found


def test_overlapping_windows_that_disagree_follow_the_one_whose_middle_is_nearer(
    hu: np.ndarray,
) -> None:
    plan = WindowPlan(hu)
    corners = plan.corners
    assert len(corners) > 1
    canvas = Canvas(plan, hu.shape, 8)
    for number, corner in enumerate(corners[:2], start=1):
        window = plan.cut(corner)
        num = int((window.cell[:, 0] < np.prod(WINDOW)).sum())
        voxels = np.full((num, PATCH**3), number, np.uint8)
        canvas.add(window, np.concatenate([voxels, voxels * 0 + 255, voxels[:, :1]], axis=1))
    labels, _, _ = canvas.join()
    start = plan.body[2].start
    along = labels[:, :, start:].astype(np.int64)
    middle = PATCH * (corners[0][2] + corners[1][2] + WINDOW[2]) / 2
    for number in (1, 2):
        places = np.nonzero(along == number)[2]
        assert places.size
        assert (places < middle).all() if number == 1 else (places >= middle).all()


def test_the_box_is_that_of_the_largest_body(hu: np.ndarray) -> None:
    room = np.full((60, 60, 60), -1000.0, dtype=np.float32)
    room[20:40, 10:50, 12:48] = 40.0
    room[2:6, 2:6, 2:6] = 700.0
    for found, low, high in zip(body_box(room), (20, 10, 12), (40, 50, 48), strict=True):
        assert low - 2 <= found.start <= low
        assert high <= found.stop <= high + 2
    assert body_box(room * 0 - 1000) == (slice(0, 60), slice(0, 60), slice(0, 60))


def test_the_shrunk_case_keeps_its_mean() -> None:
    rng = np.random.default_rng(0)
    voxels = rng.normal(0, 100, (45, 70, 33)).astype(np.float32)
    assert shrink_case(voxels).mean() == pytest.approx(voxels.mean(), abs=0.05)
    flat = np.full((45, 70, 33), 12.5, dtype=np.float32)
    np.testing.assert_allclose(shrink_case(flat), 12.5, rtol=1e-5)


def test_a_place_is_the_distance_from_the_middle_of_the_body(hu: np.ndarray) -> None:
    plan = WindowPlan(hu)
    window = plan.cut(plan.corners[0])
    extent = np.array([box.stop - box.start for box in plan.body]) * windows.GRID_MM
    case, own = window.place_mm[: windows.CASE_EDGE**3], window.place_mm[windows.CASE_EDGE**3 :]
    np.testing.assert_allclose(case.mean(axis=0), 0.0, atol=1e-3)
    np.testing.assert_allclose(case.min(axis=0), -extent * 3 / 8, rtol=1e-5)
    first = np.unravel_index(window.cell[windows.CASE_EDGE**3, 0], WINDOW)
    expected = (np.array(first) + 0.5) * PATCH * windows.GRID_MM - extent / 2
    np.testing.assert_allclose(own[0], expected, rtol=1e-5)
