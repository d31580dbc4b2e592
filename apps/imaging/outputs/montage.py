"""Several overlays in one picture, with captions and the notice burned in."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apps.imaging.finding import Findings
from apps.imaging.outputs.anatomy import anatomy_of
from apps.imaging.outputs.derived import NOTICE
from apps.imaging.outputs.overlay import Rgb, picture_of, rgb_of
from apps.imaging.outputs.selection import body_region
from apps.imaging.stack import SliceStack

COLUMNS = 3
TILE = 384  # pixels of a tile's width
CAPTION = 24  # pixels
INK, PAPER = (235, 235, 235), (12, 12, 12)


def montage_of(stack: SliceStack, findings: Findings, indices: Sequence[int]) -> Rgb:
    """Return organs over the given slices, in reading order, uint8 [height, width, 3]."""
    region = body_region(stack, indices)
    height_mm, width_mm = np.array(stack.hu[0][region].shape) * stack.pixel_mm
    tile_height = max(1, round(TILE * height_mm / width_mm))
    rows = -(-len(indices) // COLUMNS)
    size = (COLUMNS * TILE, rows * (tile_height + CAPTION) + 2 * CAPTION)
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, index in enumerate(indices):
        left = (place % COLUMNS) * TILE
        top = (place // COLUMNS) * (tile_height + CAPTION)
        picture = picture_of(stack, findings, index, region)
        tile = Image.fromarray(picture.organs.over(rgb_of(picture.grey)))
        sheet.paste(tile.resize((TILE, tile_height)), (left, top + CAPTION))
        draw.text((left + 6, top + 4), _caption(stack, index), INK, font)
    _legend(draw, font, findings, size[1] - 2 * CAPTION)
    draw.text((6, size[1] - CAPTION + 4), NOTICE, INK, font)
    return np.asarray(sheet)


def _caption(stack: SliceStack, index: int) -> str:
    filled = ", filled in" if stack.is_interpolated[index] else ""
    return f"slice {index + 1} of {stack.num_slices}, {stack.positions_mm[index]:.1f} mm{filled}"


def _legend(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    findings: Findings,
    top: int,
) -> None:
    left = 6.0
    for organ in (each for each in findings.organs if each.box is not None):
        anatomy = anatomy_of(organ.name)
        draw.rectangle((left, top + 6, left + 12, top + 18), anatomy.colour)
        draw.text((left + 17, top + 4), anatomy.title, INK, font)
        left += 32 + draw.textlength(anatomy.title, font)
