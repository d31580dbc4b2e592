"""Stack to grid and back: places in millimetres, tilt, unequal steps, any orientation."""

from itertools import permutations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from apps.imaging.resample import PatientGrid
from apps.imaging.stack import SliceStack

Vector = NDArray[np.float64]
GRADIENT = np.array([3.0, -2.0, 1.5])  # HU per mm


def make_stack(
    row_axis: Vector,
    column_axis: Vector,
    steps: list[float],
    shift: tuple[float, float] = (0.0, 0.0),
    rows: int = 20,
    columns: int = 24,
) -> SliceStack:
    """Slices whose density is a plane in space; each is moved by ``shift`` against the last."""
    normal = np.cross(row_axis, column_axis)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    places = np.arange(along.size)[:, None]
    origins = np.array([5.0, -7.0, 40.0]) + along[:, None] * normal
    origins = origins + places * (shift[0] * column_axis + shift[1] * row_axis)
    pixel_mm = (1.5, 1.25)
    points = (
        origins[:, None, None]
        + pixel_mm[0] * np.arange(rows)[None, :, None, None] * column_axis
        + pixel_mm[1] * np.arange(columns)[None, None, :, None] * row_axis
    )
    hu = (points @ GRADIENT).round().astype(np.int16)
    return SliceStack(
        hu, origins, row_axis, column_axis, pixel_mm, np.zeros(along.size, dtype=np.bool_)
    )


def points_of(grid: PatientGrid, shape: tuple[int, ...]) -> Vector:
    """Return the place of every grid voxel, by the definition of the axes, [Z, Y, X, 3]."""
    stack = grid.stack
    axes = [stack.normal, stack.column_axis, stack.row_axis]
    parts = []
    for patient_axis, (axis, mirrored) in enumerate(grid.axes):
        places = grid.places_mm[axis][:: -1 if mirrored else 1]
        view = [1, 1, 1, 3]
        view[patient_axis] = places.size
        parts.append((places[:, None] * axes[axis]).reshape(view))
    whole: Vector = parts[0] + parts[1] + parts[2] + stack.origins_mm[0]
    assert whole.shape[:3] == shape
    return whole


AXES = [
    (np.eye(3)[a] * s, np.eye(3)[b] * t)
    for (a, b), s, t in product(permutations(range(3), 2), (1.0, -1.0), (1.0, -1.0))
]


@pytest.mark.parametrize(("row_axis", "column_axis"), AXES)
def test_a_plane_in_space_stays_one_in_every_orientation(
    row_axis: Vector, column_axis: Vector
) -> None:
    grid = PatientGrid(make_stack(row_axis, column_axis, [2.0] * 12), 3.0)
    hu = grid.sample()
    points = points_of(grid, hu.shape)
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(hu[inner], (points @ GRADIENT)[inner], atol=1.0)
    for axis in range(3):  # superior, posterior, left
        patient = 2 - axis
        first, last = np.take(points, 0, axis=axis), np.take(points, -1, axis=axis)
        assert (last[..., patient] > first[..., patient]).all()


def test_tilt_and_unequal_steps_do_not_bend_it() -> None:
    steps = [4.0] * 6 + [1.08] + [7.0] * 6
    stack = make_stack(np.eye(3)[0], np.eye(3)[1], steps, shift=(1.2, 0.0), rows=60)
    grid = PatientGrid(stack, 3.0)
    hu = grid.sample()
    points = points_of(grid, hu.shape)
    covered = hu > -900
    deep = covered.copy()
    for axis, way in product(range(3), (-1, 1)):
        deep &= np.roll(covered, way * 2, axis)
    deep[[0, 1, -1, -2]] = deep[:, [0, 1, -1, -2]] = deep[:, :, [0, 1, -1, -2]] = False
    assert deep.mean() > 0.3
    np.testing.assert_allclose(hu[deep], (points @ GRADIENT)[deep], atol=4.0)


def test_every_pixel_gets_the_voxel_that_is_nearest_in_space() -> None:
    stack = make_stack(np.eye(3)[1], np.eye(3)[2], [4.0] * 5 + [7.0] * 3, shift=(0.9, 0.0))
    grid = PatientGrid(stack, 3.0)
    shape = grid.sample().shape
    codes = np.arange(np.prod(shape)).reshape(shape)
    back = sum(
        grid.spread(((codes >> (8 * byte)) & 255).astype(np.uint8)).astype(np.int64) << (8 * byte)
        for byte in range(3)
    )
    points = points_of(grid, shape).reshape(-1, 3)
    for k, j, i in [(0, 0, 0), (3, 7, 11), (5, 19, 23), (8, 10, 2)]:
        place = stack.origins_mm[k] + 1.5 * j * stack.column_axis + 1.25 * i * stack.row_axis
        nearest = np.linalg.norm(points - place, axis=1)
        assert nearest[np.asarray(back)[k, j, i]] == pytest.approx(nearest.min(), abs=1e-6)


def test_noise_is_averaged_on_the_way_down() -> None:
    stack = make_stack(np.eye(3)[0], np.eye(3)[1], [0.75] * 40, rows=64, columns=64)
    rng = np.random.default_rng(0)
    noisy = SliceStack(
        rng.normal(0, 100, stack.hu.shape).astype(np.int16),
        stack.origins_mm,
        stack.row_axis,
        stack.column_axis,
        (0.75, 0.75),
        stack.is_interpolated,
    )
    inner = PatientGrid(noisy, 3.0).sample()[2:-2, 2:-2, 2:-2]
    assert inner.std() < 100 / 4**1.5
