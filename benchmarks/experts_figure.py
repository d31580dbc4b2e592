"""A picture of which experts work for which application and kind of token, as SVG."""

from collections.abc import Mapping
from html import escape

import numpy as np
from numpy.typing import NDArray

CELL, GAP, LEFT, TOP = 26, 14, 130, 34
LIGHT, DARK = np.array([247, 251, 255]), np.array([8, 69, 148])
FULL = 2.0  # times the even share that is drawn darkest


def draw_shares(shares: Mapping[str, NDArray[np.float64]]) -> str:
    """Return an SVG: a block of rows per layer, a row per group of tokens, a column per expert.

    Args:
        shares: Of each group's choices that fell on each expert, by its name [L, E].
    """
    names = list(shares)
    layers, experts = shares[names[0]].shape
    block = CELL * len(names) + GAP
    width, height = LEFT + CELL * experts + 60, TOP + block * layers + 24
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
        (
            '<text x="8" y="18">times the even share of the tokens of a row, '
            "by expert (columns) and layer (blocks)</text>"
        ),
    ]
    for layer in range(layers):
        top = TOP + layer * block
        for i, name in enumerate(names):
            y = top + i * CELL
            parts.append(
                f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>'
            )
            for expert, times in enumerate(shares[name][layer] * experts):
                parts.append(_cell(LEFT + expert * CELL, y, float(times)))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, times: float) -> str:
    depth = min(times / FULL, 1.0)
    red, green, blue = (LIGHT + depth * (DARK - LIGHT)).round().astype(int)
    ink = "white" if depth > 0.55 else "black"
    return (
        f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
        f'fill="rgb({red},{green},{blue})"/>'
        f'<text x="{x + CELL / 2 - 0.5}" y="{y + 17}" text-anchor="middle" font-size="10" '
        f'fill="{ink}">{times:.1f}</text>'
    )
