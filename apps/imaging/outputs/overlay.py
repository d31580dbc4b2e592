"""Pictures of a slice: grey CT, and over it organs, confidence, and which experts decided.

A layer is an index image with a palette whose fourth column is opacity.  So it is small as a
PNG over the grey picture in a page, and the same layer is blended into one picture for files,
PDF and capture.

Legend: J rows, I columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apps.imaging.finding import Findings, Organ
from apps.imaging.outputs.anatomy import anatomy_of
from apps.imaging.stack import SliceStack

CENTRE_HU, WIDTH_HU = 40.0, 400.0  # the usual window for soft tissue
BODY_HU = -500  # above: not air
CERTAIN = 0.95  # from there on the confidence layer is clear
DOUBTFUL = 0.5  # there it is full
CONFIDENCE_OPACITY = 0.75
FILL_OPACITY, EDGE_OPACITY, EXPERT_OPACITY = 70, 255, 190
CERTAIN_RGB, DOUBTFUL_RGB = (255, 214, 102), (214, 40, 57)
GLOBAL_RGB, LOCAL_RGB = (120, 110, 255), (255, 150, 20)
JPEG_QUALITY = 85

Region = tuple[slice, slice]  # of rows and columns
WHOLE: Region = (slice(None), slice(None))
Grey = NDArray[np.uint8]
Rgb = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Layer:
    """An index image over a slice.

    Args:
        index: uint8 [J, I].
        palette: Red, green, blue, opacity of each index, uint8 [256, 4].
    """

    index: NDArray[np.uint8]
    palette: NDArray[np.uint8]

    def thinned(self, step: int) -> "Layer":
        """Return every ``step``-th pixel; for layers without fine detail."""
        return Layer(np.ascontiguousarray(self.index[::step, ::step]), self.palette)

    def without_fill(self) -> "Layer":
        """Return what is opaque alone."""
        palette = self.palette.copy()
        palette[palette[:, 3] < EDGE_OPACITY, 3] = 0
        return Layer(self.index, palette)

    def png(self) -> bytes:
        """Return it as a PNG with opacity."""
        image = Image.fromarray(self.index)
        image.putpalette(self.palette[:, :3].tobytes(), "RGB")
        buffer = BytesIO()
        image.save(buffer, "PNG", transparency=self.palette[:, 3].tobytes())
        return buffer.getvalue()

    def over(self, picture: Rgb) -> Rgb:
        """Return a picture [J, I, 3] with the layer blended over it."""
        colour = self.palette[self.index].astype(np.float32)
        opacity = colour[..., 3:] / 255.0
        blended: NDArray[np.float32] = picture * (1.0 - opacity) + colour[..., :3] * opacity
        return (blended + 0.5).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class SlicePicture:
    """One slice as shown to a reviewer.

    Args:
        index: Of the slice in its stack.
        grey: Windowed CT, uint8 [J, I].
        organs: Outlines and a light fill.
        outlines: The outlines alone, to go over other layers.
        confidence: Clear where the model is certain.
        experts: Local against global, on what is not air.
    """

    index: int
    grey: Grey
    organs: Layer
    outlines: Layer
    confidence: Layer
    experts: Layer


def picture_of(
    stack: SliceStack, findings: Findings, index: int, region: Region = WHOLE
) -> SlicePicture:
    """Return the picture of one slice, or of a part of it."""
    hu = stack.hu[index][region]
    share = np.where(hu > BODY_HU, np.maximum(findings.local_share[index][region], 1), 0)
    organs = organ_layer(findings.labels[index][region], findings.organs)
    return SlicePicture(
        index,
        grey_of(hu),
        organs,
        organs.without_fill(),
        Layer(findings.confidence[index][region], _confidence_palette()),
        Layer(share.astype(np.uint8), _expert_palette()),
    )


def grey_of(hu: NDArray[np.int16] | NDArray[np.float32]) -> Grey:
    """Return Hounsfield units in the soft-tissue window as grey values."""
    low = CENTRE_HU - WIDTH_HU / 2
    values = (hu.astype(np.float32) - low) * (255.0 / WIDTH_HU) + 0.5
    grey: Grey = np.clip(values, 0, 255).astype(np.uint8)
    return grey


def organ_layer(labels: NDArray[np.uint8], organs: Sequence[Organ]) -> Layer:
    """Return outlines and fill of the organs of a slice; labels up to 127."""
    palette = np.zeros((256, 4), dtype=np.uint8)
    for organ in organs:
        colour = anatomy_of(organ.name).colour
        palette[2 * organ.label] = (*colour, FILL_OPACITY)
        palette[2 * organ.label + 1] = (*colour, EDGE_OPACITY)
    return Layer(2 * labels + _is_edge(labels), palette)


def rgb_of(grey: Grey) -> Rgb:
    """Return a grey picture with three equal channels."""
    return np.repeat(grey[..., None], 3, axis=2)


def png_of(picture: Rgb) -> bytes:
    """Return a picture as PNG."""
    return _encoded(picture, "PNG", compress_level=4)


def jpeg_of(picture: Grey) -> bytes:
    """Return a grey picture as JPEG: a quarter of the PNG, for pages."""
    return _encoded(picture, "JPEG", quality=JPEG_QUALITY)


def _encoded(picture: NDArray[np.uint8], form: str, **options: int) -> bytes:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, form, **options)
    return buffer.getvalue()


def _is_edge(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return 1 where an organ touches something else."""
    edge = np.zeros(labels.shape, dtype=np.bool_)
    rows, columns = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= rows
    edge[:-1] |= rows
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    return (edge & (labels > 0)).astype(np.uint8)


def _confidence_palette() -> NDArray[np.uint8]:
    sure = np.arange(256) / 255.0
    doubt = np.clip((CERTAIN - sure) / (CERTAIN - DOUBTFUL), 0.0, 1.0)
    colour = _mixed(CERTAIN_RGB, DOUBTFUL_RGB, doubt)
    return np.column_stack([colour, 255 * CONFIDENCE_OPACITY * np.sqrt(doubt)]).astype(np.uint8)


def _expert_palette() -> NDArray[np.uint8]:
    """Return one colour for each side, the clearer the more even the share; index 0 is air."""
    lean = 2 * np.arange(256) / 255.0 - 1.0
    colour = np.where(lean[:, None] < 0, GLOBAL_RGB, LOCAL_RGB)
    opacity = EXPERT_OPACITY * np.abs(lean)
    opacity[0] = 0
    return np.column_stack([colour, opacity]).astype(np.uint8)


def _mixed(
    start: tuple[int, int, int], end: tuple[int, int, int], part: NDArray[np.float64]
) -> NDArray[np.float64]:
    first, last = np.array(start, dtype=np.float64), np.array(end, dtype=np.float64)
    return first + part[:, None] * (last - first)
