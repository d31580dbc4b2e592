"""Windows of a case on the model's grid: what is asked of the model, and its answers joined.

A window is a fixed box of cubic patches; those that hold only air are left out.  Every window
brings the whole case along, shrunk to a small cube, so that the model sees what it relates to.
Windows overlap, and where they do each one's say falls off from its middle as a Gaussian.

Training cuts windows by the same functions.

Legend: Z Y X axes of the grid, R rows, P patches, V voxels of a patch, L labels.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from apps.imaging.resample import AIR_HU

PATCH = 8  # voxels along an edge of a patch
WINDOW = (12, 12, 12)  # patches of a window
CASE_EDGE = 4  # patches along an edge of the shrunk case
GRID_MM = 3.0
BODY_HU = -500.0  # below is air
OVERLAP = 2  # patches by which neighbouring windows overlap at least
SIGMA = 0.25  # of a window's edge

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Rows of one window as the model takes them.

    Args:
        corner: First patch of the window on the patch grid of the body.
        hu: Voxels of the patches, the shrunk case first, float32 [R, V].
        cell: Place of each in the window, or behind it for those of the case, int32 [R, 1].
        place_mm: Centre of each from the case's centre, float32 [R, 3].
    """

    corner: tuple[int, int, int]
    hu: Floats
    cell: NDArray[np.int32]
    place_mm: Floats


class WindowPlan:
    """The windows that cover a case's body.

    Args:
        hu: The case on the model's grid, float32 [Z, Y, X].
    """

    def __init__(self, hu: Floats) -> None:
        self.body = body_box(hu)
        inside = hu[self.body]
        self.size = tuple(max(-(-n // PATCH), w) for n, w in zip(inside.shape, WINDOW, strict=True))
        room = [(0, PATCH * n - m) for n, m in zip(self.size, inside.shape, strict=True)]
        self._patches = to_patches(np.pad(inside, room, constant_values=AIR_HU))
        self._holds_body = self._patches.max(axis=-1) > BODY_HU
        self._case = shrink_case(inside)
        self._extent_mm = np.array(inside.shape, dtype=np.float32) * GRID_MM

    @property
    def corners(self) -> list[tuple[int, int, int]]:
        """First patch of each window that holds any of the body."""
        z, y, x = (_starts(size, edge) for size, edge in zip(self.size, WINDOW, strict=True))
        return [at for at in product(z, y, x) if self._holds_body[self._box(at)].any()]

    def cut(self, corner: tuple[int, int, int]) -> Window:
        """Return the rows of the window at a corner."""
        kept = self._holds_body[self._box(corner)].ravel()
        patches = self._patches[self._box(corner)].reshape(kept.size, -1)[kept]
        spots = np.stack(np.unravel_index(np.flatnonzero(kept), WINDOW), axis=1)
        middle = (np.array(corner) + spots + 0.5) * (PATCH * GRID_MM) - self._extent_mm / 2
        steps = (np.arange(CASE_EDGE) + 0.5) / CASE_EDGE - 0.5
        case_place = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1)
        case_place = case_place.reshape(-1, 3) * self._extent_mm
        num_case = self._case.shape[0]
        cell = np.concatenate([kept.size + np.arange(num_case), np.flatnonzero(kept)])
        return Window(
            corner,
            np.concatenate([self._case, patches]),
            cell.astype(np.int32)[:, None],
            np.concatenate([case_place, middle]).astype(np.float32),
        )

    def _box(self, corner: tuple[int, int, int]) -> tuple[slice, ...]:
        return tuple(slice(c, c + w) for c, w in zip(corner, WINDOW, strict=True))


class Canvas:
    """Answers of overlapping windows, joined on the grid of the case.

    Args:
        plan: The windows.
        shape: Of the case on the model's grid.
        num_labels: With 0 for none.
    """

    def __init__(self, plan: WindowPlan, shape: tuple[int, ...], num_labels: int) -> None:
        self._plan, self._shape = plan, shape
        size = [PATCH * num for num in plan.size]
        self._votes = np.zeros((num_labels, *size), dtype=np.float32)
        self._weight = np.zeros(size, dtype=np.float32)
        self._share = np.zeros(size, dtype=np.float32)

    def add(self, window: Window, rows: NDArray[np.uint8]) -> None:
        """Take a window's answer: label, confidence and local share of its patches.

        Args:
            window: What was asked.
            rows: uint8 [P, 2 V + 1], patches of the window as they were asked.
        """
        num_voxels = PATCH**3
        cell = window.cell[window.cell[:, 0] < np.prod(WINDOW), 0]
        box = tuple(
            slice(PATCH * c, PATCH * (c + w)) for c, w in zip(window.corner, WINDOW, strict=True)
        )
        fade = gaussian(WINDOW)
        label = self._fill(cell, rows[:, :num_voxels]).astype(np.intp)[None]
        sure = self._fill(cell, rows[:, num_voxels : 2 * num_voxels])
        share = self._fill(cell, np.repeat(rows[:, -1:], num_voxels, axis=1))
        votes = self._votes[(slice(None), *box)]
        before = np.take_along_axis(votes, label, axis=0)
        np.put_along_axis(votes, label, before + (sure * fade)[None], axis=0)
        self._weight[box] += (sure > 0) * fade
        self._share[box] += share * fade

    def join(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Return labels, confidence and local share on the grid of the case, uint8 [Z, Y, X]."""
        weight = np.maximum(self._weight, 1e-6)
        best = self._votes.argmax(axis=0)
        sure = np.take_along_axis(self._votes, best[None], axis=0)[0] / weight
        inside = tuple(slice(box.stop - box.start) for box in self._plan.body)
        found = []
        for values in (best, sure.round(), (self._share / weight).round()):
            whole = np.zeros(self._shape, dtype=np.uint8)
            whole[self._plan.body] = np.minimum(values, 255)[inside].astype(np.uint8)
            found.append(whole)
        return found[0], found[1], found[2]

    def _fill(self, cell: NDArray[np.int32], rows: NDArray[np.uint8]) -> Floats:
        cells = np.zeros((int(np.prod(WINDOW)), PATCH**3), dtype=np.float32)
        cells[cell] = rows
        return from_patches(cells, WINDOW)


def body_box(hu: Floats) -> tuple[slice, slice, slice]:
    """Return the box of the largest piece that is not air; of everything if nothing is."""
    pieces, num = ndimage.label(hu[::2, ::2, ::2] > BODY_HU)
    if num == 0:
        whole = tuple(slice(0, n) for n in hu.shape)
        return whole[0], whole[1], whole[2]
    largest = np.bincount(pieces.ravel())[1:].argmax() + 1
    box = ndimage.find_objects(pieces)[largest - 1]
    found = [
        slice(max(2 * at.start - 1, 0), min(2 * at.stop + 1, n))
        for at, n in zip(box, hu.shape, strict=True)
    ]
    return found[0], found[1], found[2]


def to_patches(voxels: Floats) -> Floats:
    """Return [z, y, x, V] of voxels [8z, 8y, 8x]."""
    z, y, x = (n // PATCH for n in voxels.shape)
    cells = voxels.reshape(z, PATCH, y, PATCH, x, PATCH).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(cells).reshape(z, y, x, PATCH**3)


def from_patches(rows: Floats, window: tuple[int, int, int]) -> Floats:
    """Return voxels [8z, 8y, 8x] of patches [z y x, V]."""
    z, y, x = window
    cells = rows.reshape(z, y, x, PATCH, PATCH, PATCH).transpose(0, 3, 1, 4, 2, 5)
    return cells.reshape(PATCH * z, PATCH * y, PATCH * x)


def shrink_case(hu: Floats) -> Floats:
    """Return the case as the patches of a cube of 32 voxels, each the mean of what it covers."""
    edge, cube = CASE_EDGE * PATCH, hu
    for axis in range(3):
        cube = np.moveaxis(
            _mean_weights(cube.shape[axis], edge) @ np.moveaxis(cube, axis, 1), 1, axis
        )
    return to_patches(cube).reshape(CASE_EDGE**3, -1)


@cache
def gaussian(window: tuple[int, int, int]) -> Floats:
    """Return the weight of a window's voxels, 1 in the middle."""
    edges = [PATCH * w for w in window]
    falls = [np.exp(-0.5 * ((np.arange(n) + 0.5 - n / 2) / (SIGMA * n)) ** 2) for n in edges]
    weight: Floats = np.einsum("i,j,k->ijk", *falls).astype(np.float32)
    return weight


def _starts(size: int, edge: int) -> list[int]:
    """Return where windows of an edge begin so that they cover a size and overlap evenly."""
    num = 1 if size <= edge else -(-(size - OVERLAP) // (edge - OVERLAP))
    starts: list[int] = np.linspace(0, size - edge, num).round().astype(int).tolist()
    return starts


@cache
def _mean_weights(have: int, want: int) -> Floats:
    """Return what each of ``have`` cells gives to each of ``want``, by length, [want, have]."""
    edges = np.linspace(0, have, want + 1)
    low, high = np.arange(have)[None, :], np.arange(1, have + 1)[None, :]
    covered = np.minimum(high, edges[1:, None]) - np.maximum(low, edges[:-1, None])
    weights: Floats = (np.maximum(covered, 0) * (want / have)).astype(np.float32)
    return weights
