"""Tile sizes of the attention kernels, one entry a kind, from ``kernels/configs/attention.json``.

Kinds: "window" and "full" (``kernels.attention``); "scores", "sparse" and "pooled", the last for
pooled far keys (``kernels.block_sparse``, whose pattern sets the rows of a program).
``benchmarks.kernel_sweep_attention`` measures candidates and writes the file.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class TileConfig(NamedTuple):
    """How a launch is cut.

    Args:
        block_q: Rows of a program.
        block_k: Keys of a step.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are under way together.
        max_registers: Of a thread, so that several programs share a multiprocessor; 0 = any.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int = 0

    def options(self) -> dict[str, int | None]:
        """Return what the compiler is told."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers or None,
        }


@cache
def tiles() -> dict[str, TileConfig]:
    """Return the tiles of each kind of launch."""
    text = files("kernels").joinpath("configs/attention.json").read_text(encoding="utf-8")
    return {kind: TileConfig(**entry) for kind, entry in json.loads(text).items()}


@contextmanager
def using(kind: str, config: TileConfig) -> Iterator[None]:
    """Launch a kind with these tiles instead, to measure or to test them."""
    usual = tiles()[kind]
    tiles()[kind] = config
    try:
        yield
    finally:
        tiles()[kind] = usual
