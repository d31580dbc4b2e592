"""A generated head and neck: organs as shapes with Hounsfield units, noise and spacing.

For tests, the demo, and weights that may be shipped without a question.  No patient's
anatomy is in it; what a model scores on it says nothing about people.

Coordinates are DICOM's patient axes (left, posterior, superior) in mm, from a point between
the ears.  Shapes are painted in order; later ones cover earlier ones.

Legend: K J I slices, rows and columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from apps.imaging.stack import SliceStack

AIR, FAT, MUSCLE, BRAIN, BONE, MARROW = -1000.0, -90.0, 55.0, 35.0, 1000.0, 250.0
Grid = NDArray[np.float64]
Inside = Callable[[Grid, Grid, Grid], NDArray[np.bool_]]
Point = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class PhantomShape:
    """How a phantom is scanned.

    Args:
        slices: K.
        pixels: J and I.
        slice_mm: Distance of slices.
        pixel_mm: Distance of pixels.
        noise_hu: Standard deviation.
    """

    slices: int = 96
    pixels: int = 128
    slice_mm: float = 3.0
    pixel_mm: float = 3.2
    noise_hu: float = 18.0


class Part(NamedTuple):
    """One shape: its density, its label (0 = none of the organs), where it is."""

    hu: float
    label: int
    inside: Inside


def make_phantom(
    seed: int, shape: PhantomShape | None = None
) -> tuple[SliceStack, NDArray[np.uint8]]:
    """Return slices and the label of each of their pixels, uint8 [K, J, I]; seeded.

    Labels follow ``apps.imaging.segmentation.ORGANS``, from 1.
    """
    shape = shape or PhantomShape()
    rng = np.random.default_rng(seed)
    size = np.array([shape.slices, shape.pixels, shape.pixels])
    step = np.array([shape.slice_mm, shape.pixel_mm, shape.pixel_mm])
    first = -(size - 1) / 2 * step + np.array([-25.0, 0.0, 0.0]) + rng.normal(0, 4, 3)
    axes = [first[a] + step[a] * np.arange(size[a]) for a in range(3)]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    scale, turn = rng.uniform(0.9, 1.1), rng.normal(0, 0.06)
    x, y = (
        (x * np.cos(turn) - y * np.sin(turn)) / scale,
        (x * np.sin(turn) + y * np.cos(turn)) / scale,
    )
    hu = np.full(tuple(size), AIR)
    labels = np.zeros(tuple(size), dtype=np.uint8)
    for part in _parts(rng):
        inside = part.inside(x, y, z / scale)
        hu[inside] = part.hu
        labels[inside] = part.label
    hu = ndimage.gaussian_filter(hu, 0.6) + rng.normal(0, shape.noise_hu, size)
    origins = np.stack(
        [np.full(size[0], axes[2][0]), np.full(size[0], axes[1][0]), axes[0]], axis=1
    )
    stack = SliceStack(
        hu=hu.round().clip(-1024, 3071).astype(np.int16),
        origins_mm=origins,
        row_axis=np.array([1.0, 0.0, 0.0]),
        column_axis=np.array([0.0, 1.0, 0.0]),
        pixel_mm=(shape.pixel_mm, shape.pixel_mm),
        is_interpolated=np.zeros(size[0], dtype=np.bool_),
    )
    return stack, labels


def _parts(rng: np.random.Generator) -> Iterator[Part]:
    """Yield the parts of one person, outside in."""

    def near(*point: float) -> Point:
        x, y, z = point + rng.normal(0, 2.0, 3)
        return float(x), float(y), float(z)

    def sized(*radii: float) -> Point:
        x, y, z = np.array(radii) * rng.uniform(0.88, 1.12, 3)
        return float(x), float(y), float(z)

    def density(hu: float) -> float:
        return float(hu + rng.normal(0, 6))

    yield Part(FAT, 0, _ellipsoid((0, 10, -190), (215, 115, 75)))
    yield Part(MUSCLE, 0, _ellipsoid((0, 10, -190), (200, 100, 66)))
    yield Part(FAT, 0, _tube((0, 8), (66, 70), (-190, 20)))
    yield Part(MUSCLE, 0, _tube((0, 8), (58, 62), (-190, 20)))
    yield Part(MUSCLE, 0, _ellipsoid((0, 0, 35), (80, 100, 115)))
    yield Part(BONE, 0, _ellipsoid((0, 8, 60), (72, 88, 84)))
    yield Part(BRAIN, 0, _ellipsoid((0, 8, 60), (65, 81, 77)))
    yield Part(AIR, 0, _ellipsoid((0, -52, 5), (22, 30, 16)))  # nose and mouth
    yield Part(MARROW, 0, _tube((0, 42), (17, 15), (-250, 5)))
    yield Part(BONE, 0, _tube((0, 52), (19, 14), (-250, 5)))
    yield Part(AIR, 0, _tube((0, -8), (9, 8), (-250, -20)))  # pharynx and windpipe
    yield Part(density(38), 1, _ellipsoid(near(0, 30, 22), sized(13, 12, 24)))
    yield Part(density(32), 2, _tube((0, 50), sized(6, 5, 0)[:2], (-250, 0)))
    for label, side in ((3, -1.0), (4, 1.0)):
        yield Part(density(5), label, _ellipsoid(near(side * 58, 12, -12), sized(13, 18, 25)))
    yield Part(density(40), 5, _tube(near(0, 14, 0)[:2], sized(8, 7, 0)[:2], (-250, -78)))
    larynx, radii = near(0, -14, -62), sized(17, 19, 22)
    yield Part(density(70), 6, _ellipsoid(larynx, radii))
    yield Part(BONE, 7, _jaw(near(0, -22, -14), sized(48, 62, 15)))


def _ellipsoid(centre: Point, radii: Point) -> Inside:
    def inside(x: Grid, y: Grid, z: Grid) -> NDArray[np.bool_]:
        parts = [(a - c) / r for a, c, r in zip((x, y, z), centre, radii, strict=True)]
        return parts[0] ** 2 + parts[1] ** 2 + parts[2] ** 2 <= 1.0

    return inside


def _tube(centre: tuple[float, ...], radii: tuple[float, ...], ends: tuple[float, float]) -> Inside:
    """An upright cylinder with an ellipse as its base."""

    def inside(x: Grid, y: Grid, z: Grid) -> NDArray[np.bool_]:
        base = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1.0
        return base & (z >= ends[0]) & (z <= ends[1])

    return inside


def _jaw(centre: Point, radii: Point) -> Inside:
    """The front half of a ring, as high as ``radii[2]`` on each side."""

    def inside(x: Grid, y: Grid, z: Grid) -> NDArray[np.bool_]:
        x, y = x - centre[0], y - centre[1]
        outer = (x / radii[0]) ** 2 + (y / radii[1]) ** 2
        inner = (x / (radii[0] - 10)) ** 2 + (y / (radii[1] - 10)) ** 2
        ring = (outer <= 1.0) & (inner >= 1.0) & (y < 20)
        return ring & (np.abs(z - centre[2]) <= radii[2])

    return inside
