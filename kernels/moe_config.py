"""How the products of ``fused_moe`` are cut into programs, from sizes the host knows.

The histogram of the experts stays on the device; the host knows the mean load, T * K / E.
Configurations were chosen by ``python -m benchmarks.kernel_sweep`` on an H200 and are kept as
data in ``configs/h200.json``, one entry for a layer, a dtype and a number of tokens.

Lookup: entries of the same experts, chosen, width, hidden and dtype; of these the one whose
tokens are nearest by ratio.  A layer without entries is cut by ``rule``.

Legend: T tokens, D model, F expert hidden, E experts, K chosen.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

TUNED = Path(__file__).with_name("configs") / "h200.json"
NUM_CORES = 132  # multiprocessors of a Hopper GPU
MIN_BLOCK = 16  # smallest dimension of a matrix product
SMALL_ROWS = 32  # up to here the weights are the left operand
MAX_ROWS = 128  # of a tile
LEFT_ROWS = 64  # of the left operand of wgmma
NARROW, NARROW_HIDDEN = 128, 256  # widths of which a program holds whole rows


class MoESize(NamedTuple):
    """A layer of experts as the host knows it."""

    num_experts: int
    num_chosen: int
    width: int
    hidden: int
    dtype: torch.dtype

    @property
    def is_narrow(self) -> bool:
        """Tell whether both products are one launch; float32 takes three products."""
        is_held = self.width <= NARROW and self.hidden <= NARROW_HIDDEN
        return is_held and self.dtype.itemsize == 2

    def fields(self) -> dict[str, Any]:
        """Return what an entry of the data is found by."""
        return {**self._asdict(), "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True, slots=True)
class ProductLaunch:
    """How one product is cut.

    Args:
        block_n: Output columns of a program; of gate and of up each.
        block_k: Inner columns of a step.
        num_warps: Of a program.
        num_stages: Steps whose loads are under way.
        swap: Weights are the left operand.
        group: Tiles that a block of columns is visited by before the next block.
        persistent: One program to a multiprocessor, which takes one place after the other; in 8
            bits those for tiles of 128 rows always do.
        halves: A tile that is at most half full is multiplied as half a tile; of the first
            product, not persistent.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool
    group: int
    persistent: bool = False
    halves: bool = False

    def fitted(self, num_columns: int, inner: int) -> Self:
        """Return blocks no larger than the matrix needs."""
        return replace(
            self,
            block_n=max(MIN_BLOCK, min(self.block_n, _next_power(num_columns))),
            block_k=max(MIN_BLOCK, min(self.block_k, _next_power(inner))),
        )


@dataclass(frozen=True, slots=True)
class MoELaunch:
    """How both products are cut.

    Args:
        block_rows: Most rows of a tile, for ``route``.
        up: First product.
        down: Second product.
        chained: A launch comes while the last one ends (programmatic dependent launch).
    """

    block_rows: int
    up: ProductLaunch
    down: ProductLaunch
    chained: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from an entry of the data."""
        up, down = (ProductLaunch(**values[name]) for name in ("up", "down"))
        return cls(values["block_rows"], up, down, values["chained"])


@cache
def moe_launch(size: MoESize, num_tokens: int, block_rows: int | None = None) -> MoELaunch:
    """Return the tuned configuration, or that of the rule.

    Args:
        size: The layer.
        num_tokens: T.
        block_rows: What the tiles were made with, where that is decided; a tuned
            configuration of other tiles is not taken.
    """
    entry = _nearest(_entries().get(size, ()), num_tokens)
    if entry is not None and block_rows in (None, entry["block_rows"]):
        return MoELaunch.from_dict(entry)
    return rule(size, num_tokens, block_rows)


def rule(size: MoESize, num_tokens: int, block_rows: int | None = None) -> MoELaunch:
    """Return a configuration by the mean load.

    A tile holds the mean load, up to 128 rows.  Tiles of few rows stream weights: blocks as
    wide as leave two programs to a multiprocessor.  Tiles of many rows fill the accumulators.
    """
    num_rows = num_tokens * size.num_chosen
    mean = num_rows / size.num_experts
    if block_rows is None:
        block_rows = min(MAX_ROWS, max(MIN_BLOCK, _next_power(math.ceil(mean))))
    tiles = min(num_rows, size.num_experts) + num_rows // block_rows
    if block_rows <= SMALL_ROWS:
        block = ProductLaunch(64, 128, 4, 4, swap=True, group=1)
        up = _spread(block, tiles, size.hidden, LEFT_ROWS // 2)
        down = _spread(replace(block, block_n=128), tiles, size.width, LEFT_ROWS)
    elif block_rows == 64:
        up = ProductLaunch(128, 64, 4, 4, swap=False, group=2)
        down = replace(up, block_n=256)
    else:
        up = ProductLaunch(128, 64, 8, 4, swap=False, group=8)
        down = replace(up, block_n=256)
    if size.dtype == torch.float8_e4m3fn:  # blocks are runs that share a scale
        is_few = block_rows <= SMALL_ROWS
        up = ProductLaunch(128, 128, 4 if is_few else 8, 4, swap=is_few, group=1 if is_few else 8)
        return MoELaunch(block_rows, up, up)
    if size.dtype == torch.float32:  # three products each, operands twice as large
        up, down = (
            replace(each, block_n=min(64, each.block_n), block_k=32, num_warps=8, num_stages=3)
            for each in (up, down)
        )
    up = up.fitted(size.hidden, size.width)
    return MoELaunch(block_rows, up, down.fitted(size.width, size.hidden))


def _spread(block: ProductLaunch, num_tiles: int, num_columns: int, least: int) -> ProductLaunch:
    """Narrow the block, down to ``least``, until there are two programs to a multiprocessor."""
    while block.block_n > least:
        if num_tiles * math.ceil(num_columns / block.block_n) >= 2 * NUM_CORES:
            break
        block = replace(block, block_n=block.block_n // 2)
    return block


def _next_power(number: int) -> int:
    """Return the least power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()


def _nearest(entries: Sequence[Mapping[str, Any]], num_tokens: int) -> Mapping[str, Any] | None:
    wanted = math.log(max(1, num_tokens))
    return min(entries, key=lambda entry: abs(math.log(entry["tokens"]) - wanted), default=None)


@cache
def _entries() -> Mapping[MoESize, Sequence[Mapping[str, Any]]]:
    """Return the data by layer."""
    found: dict[MoESize, list[Mapping[str, Any]]] = {}
    for entry in json.loads(TUNED.read_text(encoding="utf-8"))["entries"]:
        names = {name: entry[name] for name in MoESize._fields}
        size = MoESize(**{**names, "dtype": getattr(torch, entry["dtype"])})
        found.setdefault(size, []).append(entry)
    return found
