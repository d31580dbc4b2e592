"""The ways to cut the products of ``fused_moe`` and ``fused_moe_fp8``, and the best for a case.

Legend: T tokens, D model, F expert hidden, E experts, K chosen, R routed rows.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_measure import draw_sets
from benchmarks.kernel_moe import MoEShape
from benchmarks.kernel_op import Case
from benchmarks.kernel_roofline import ceilings_of
from benchmarks.kernel_sweep_ops import SWEPT, Given, Rows, Swept, with_tiles
from benchmarks.kernel_timing import Run, Series, capture, first_line
from kernels.moe_config import MAX_ROWS, MoELaunch, MoESize, ProductLaunch, rule

SAMPLES = 5
COMPILERS = 12  # processes; what they compile stays in Triton's cache on disk
Say = Callable[[dict[str, Any]], None]


class Way(NamedTuple):
    """A way to run one of both products.

    Args:
        name: "up" or "down".
        block_rows: Of a tile.
        product: How it is cut.
    """

    name: str
    block_rows: int
    product: ProductLaunch


def ways(swept: Swept, name: str, block_rows: int) -> list[Way]:
    """Return what is tried for tiles of so many rows."""
    products = [ProductLaunch(*values) for values in swept.ways[block_rows]]
    if name == "down":
        products = [replace(each, **swept.down) for each in products]
    unique = dict.fromkeys(products)
    return [
        Way(name, block_rows, replace(each, block_n=each.block_n * swept.wider[name]))
        for each in unique
    ]


def compile_all(op: str) -> float:
    """Compile every way, many at a time; return the seconds that took."""
    began_s = time.monotonic()
    context = multiprocessing.get_context("spawn")
    swept = SWEPT[op]
    every = [
        way for rows in swept.ways for name in ("up", "down") for way in ways(swept, name, rows)
    ]
    with ProcessPoolExecutor(COMPILERS, mp_context=context) as pool:
        for future in [pool.submit(_compile, op, way) for way in every]:
            future.exception()  # it fails again, and is said so, in its case
    return round(time.monotonic() - began_s, 1)


def _compile(op: str, way: Way) -> None:
    swept, shape = SWEPT[op], MoEShape("any", 8, 2, 512, 512)
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = with_tiles(
        swept.draw(shape, 256, "uniform", torch.bfloat16, generator), way.block_rows
    )
    h_RF, _ = swept.wanted(inputs)
    for chained in (False, True):
        _call(swept, way, inputs, h_RF, chained=chained)()
    torch.cuda.synchronize()


def sweep(
    op: str, shape: MoEShape, num_tokens: int, seconds: float, say: Say
) -> dict[str, Any] | None:
    """Return the entry of a case: the fastest ways, and the time of the op with them."""
    ends_s, swept = time.monotonic() + seconds, SWEPT[op]
    draw = partial(swept.draw, shape, num_tokens, "uniform", torch.bfloat16)
    case = Case(shape.name, num_tokens, "uniform", torch.bfloat16, draw)
    sets = draw_sets(swept.op, case, "cuda")
    h_RF, y_RD = swept.wanted(sets[0])
    head = {"model": shape.name, "tokens": num_tokens}
    size = MoESize(shape.num_experts, shape.num_chosen, shape.width, shape.hidden, swept.dtype)
    best: tuple[float, MoELaunch] | None = None
    for block_rows in _tile_rows(size, num_tokens):
        tiled = [with_tiles(inputs, block_rows) for inputs in sets]
        pair: list[ProductLaunch | None] = []
        for name, want in (("up", h_RF), ("down", y_RD)):
            tried = ways(swept, name, block_rows)
            tell = partial(_tell, say, head)
            pair.append(
                rule(size, num_tokens, block_rows).up  # not used: both products are one launch
                if size.is_narrow
                else _fastest(swept, tried, tiled, (h_RF, want), ends_s, tell)
            )
        up, down = pair
        if up is None or down is None:
            continue
        for chained in (False, True):
            config = MoELaunch(block_rows, up, down, chained)
            us = _whole_us(swept, config, tiled, y_RD)
            say({**head, "us": us, **asdict(config)})
            if isinstance(us, float) and (best is None or us < best[0]):
                best = us, config
    if best is None:
        return None
    ceilings, works = ceilings_of("cuda"), [swept.op.work(inputs) for inputs in sets]
    least_us = sum(work.least_us(ceilings) for work in works) / len(works) if ceilings else math.nan
    figures = {"us": round(best[0], 2), "fraction": round(least_us / best[0], 3)}
    return {**size.fields(), "tokens": num_tokens, **asdict(best[1]), **figures}


def _tile_rows(size: MoESize, num_tokens: int) -> list[int]:
    """Return the tiles that are tried: all, or those that hold the mean load, and twice that."""
    if size.is_narrow:
        return [16, 32, 64, MAX_ROWS]
    mean = num_tokens * size.num_chosen / size.num_experts
    least = min(MAX_ROWS, max(16, 1 << max(0, math.ceil(mean) - 1).bit_length()))
    return [least] if mean < 8 or least == MAX_ROWS else [least, 2 * least]


def _call(
    swept: Swept, way: Way, inputs: Given, h_RF: Rows, *, chained: bool = False
) -> Callable[[], Rows]:
    config = MoELaunch(way.block_rows, way.product, way.product, chained)
    if way.name == "up":
        return lambda: swept.up(inputs, config)
    return lambda: swept.rows(inputs, h_RF, config)


def _fastest(
    swept: Swept,
    tried: Sequence[Way],
    sets: Sequence[Given],
    rows: tuple[Rows, Rows],
    ends_s: float,
    tell: Callable[[Way, float | str], None],
) -> ProductLaunch | None:
    """Return the fastest of the ways that are right."""
    found: list[tuple[float, ProductLaunch]] = []
    for way in tried:
        if found and time.monotonic() > ends_s:
            break
        calls = [_call(swept, way, inputs, rows[0]) for inputs in sets]
        us = time_us(swept, calls, rows[1])
        tell(way, us)
        if isinstance(us, float):
            found.append((us, way.product))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _tell(say: Say, head: dict[str, Any], way: Way, us: float | str) -> None:
    product = {"product": way.name, "us": us, "block_rows": way.block_rows}
    say({**head, **product, **asdict(way.product)})


def _whole_us(swept: Swept, config: MoELaunch, sets: Sequence[Given], y_RD: Tensor) -> float | str:
    """Return the time of the op, or why it has none."""
    routing = sets[0].routing
    y_TKD = y_RD[routing.rows_TK].float()
    want_TD = (routing.weights_TK.unsqueeze(-1) * y_TKD).sum(dim=1)
    return time_us(swept, [partial(swept.whole, inputs, config) for inputs in sets], want_TD)


def time_us(swept: Swept, calls: Sequence[Callable[[], Rows]], want: Rows) -> float | str:
    """Return the time of a call inside a graph of all, or why there is none."""
    try:
        got, wanted = swept.seen(calls[0]()), swept.seen(want)
        error = float((got - wanted).norm() / wanted.norm())
        worst = float((got - wanted).abs().max() / wanted.abs().max())
        if not (error <= swept.most_error and worst <= swept.most_difference):
            return f"wrong: error {error:.3g} of the norm, {worst:.3g} of the largest"
        del got, wanted
        runs: list[Run] = list(calls)
        for run in runs:
            run()
        series = Series(capture(runs).replay, len(runs), "cuda")
        series.warm_up()
        for _ in range(SAMPLES):
            series.samples_us.append(series._sample_us())
        return round(series.timing().us, 2)
    except Exception as error:  # noqa: BLE001 - the next way may run
        return first_line(error)
