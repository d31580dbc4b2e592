"""A row for each case of an op and each who runs it; who cannot run it says why in a row.

Rivals of a case run on the same data, their samples in turn.  Cases that an aim speaks of come
first.  A case has its share of the time that is left: what it needs at least it takes, three
samples of each series, and more of them while its share lasts; the spread says how sure they are.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_aims import is_aimed, time_of
from benchmarks.kernel_op import OURS, AbsentError, Call, Case, Inputs, Op, Peer
from benchmarks.kernel_roofline import Ceilings, ceilings_of
from benchmarks.kernel_timing import (
    NotCapturedError,
    Series,
    alternate,
    capture,
    count_launches,
    first_line,
    in_turn,
    is_gpu,
)

Row = dict[str, Any]
MIN_SETS, MAX_SETS = 3, 64
LONG_SETS = 2  # of a case whose sets are that large alone
CACHES = 2  # sets together are as large as so many L2 caches, or the row says "warm"
LONG_US = 50e3  # a call beside which launches are nothing, on a slow host too
EAGER_SAMPLES = 5  # of a call that a graph holds too
TIME_OVER = "not measured: the time was over"
ROW_NAMES = (
    *("op", "model", "size", "routing", "dtype", "who"),
    *("eager_us", "graph_us", "spread", "launches"),  # spread: of graph_us, if there is one
    "peak_mb",  # of device memory, beside the inputs
    *("roofline_us", "fraction", "tflops", "max_error"),
    *("sets", "cache", "note", "device", "torch", "triton"),
)


@dataclass(slots=True)
class Rival:
    """Someone in a case, and what was found out.

    Args:
        name: Who.
        note: Why something is missing.
        eager: Samples of eager calls.
        graph: Samples inside a graph.
        call: One of those sampled.
        launches: Of one call.
        peak_bytes: Most memory of the device that a call has at once, beside the inputs.
        max_error: Largest absolute difference from float64.
    """

    name: str
    note: str = ""
    eager: Series | None = None
    graph: Series | None = None
    call: Call | None = None
    launches: int | None = None
    peak_bytes: int | None = None
    max_error: float | None = None


def measure_op(op: Op[Inputs], device: str, seconds: float, *, is_compiled: bool) -> Iterator[Row]:
    """Yield the rows of those of an op's peers that compile, or of the others.

    Cases that are not begun in time are said so in rows.
    """
    ends_s = time.monotonic() + seconds
    ceilings = ceilings_of(device)
    machine = _machine(device)
    peers = op.rivals(is_compiled=is_compiled)
    cases = aimed_first(op, device)
    for index, case in enumerate(cases):
        left_s = ends_s - time.monotonic()
        if left_s > 0.0:
            share_s = left_s / (len(cases) - index)
            rows = measure_case(op, case, peers, device, ceilings, share_s)
        else:
            rows = [_row(op, case, Rival(peer.name, TIME_OVER)) for peer in peers]
        for row in rows:
            yield {**row, **machine}


def aimed_first(op: Op[Inputs], device: str) -> list[Case[Inputs]]:
    """Return the cases of an op, those that an aim speaks of first."""
    return sorted(op.cases(device), key=lambda case: not is_aimed(op.name, case.model, case.size))


def measure_case(
    op: Op[Inputs],
    case: Case[Inputs],
    peers: Sequence[Peer[Inputs]],
    device: str,
    ceilings: Ceilings | None,
    seconds: float = math.inf,
) -> list[Row]:
    """Return the rows of a case; an error that is nobody's own is in the rows of all.

    Past its seconds the case takes the least number of samples, and counts launches of ours alone.
    """
    try:
        with torch.no_grad():
            return _measured(op, case, peers, device, ceilings, time.monotonic() + seconds)
    except Exception as error:  # noqa: BLE001 - drawing failed, or the device is lost
        return [_row(op, case, Rival(peer.name, first_line(error))) for peer in peers]


def _measured(
    op: Op[Inputs],
    case: Case[Inputs],
    peers: Sequence[Peer[Inputs]],
    device: str,
    ceilings: Ceilings | None,
    ends_s: float,
) -> list[Row]:
    sets = draw_sets(op, case, device)
    works = [op.work(inputs) for inputs in sets]
    exact = op.exact(sets[0])
    rivals = [prepare(peer, sets, exact, device) for peer in peers]
    every = [each for rival in rivals for each in (rival.eager, rival.graph) if each]
    alternate(every, ends_s)
    for rival in rivals:  # last, since a profiler slows what follows
        if rival.call is not None and is_gpu(device):
            rival.peak_bytes = peak_bytes(rival.call)
            if rival.name.startswith(OURS) or time.monotonic() < ends_s:
                rival.launches = count_launches(rival.call)
    common: Row = {"sets": len(sets)}
    if ceilings is not None:
        least_us = sum(work.least_us(ceilings) for work in works) / len(works)
        common["roofline_us"] = round(least_us, 3)
    if is_gpu(device):
        moved = sum(work.num_bytes for work in works)
        common["cache"] = "cold" if moved >= CACHES * _cache_bytes() else "warm"
    flops = sum(work.flops for work in works) / len(works)
    return [_row(op, case, rival, common, flops) for rival in rivals]


def draw_sets(op: Op[Inputs], case: Case[Inputs], device: str) -> list[Inputs]:
    """Return some sets of inputs, on a GPU enough not to stay in its cache if possible."""
    first = case.draw(torch.Generator(device).manual_seed(0))
    count = MIN_SETS
    if is_gpu(device):
        needed = math.ceil(CACHES * _cache_bytes() / max(1.0, op.work(first).num_bytes))
        count = LONG_SETS if needed == 1 else min(MAX_SETS, max(MIN_SETS, needed))
    others = [case.draw(torch.Generator(device).manual_seed(seed)) for seed in range(1, count)]
    return [first, *others]


def prepare(
    peer: Peer[Inputs], sets: Sequence[Inputs], exact: tuple[Tensor, Tensor], device: str
) -> Rival:
    """Return the peer ready to be sampled, or with a note that says why it is not."""
    rival = Rival(peer.name, peer.does_less)
    try:
        calls = [peer.prepare(inputs) for inputs in sets]
        output = calls[0]()
        if not peer.does_less:
            rival.max_error = max_error(output, exact)
        eager = Series(in_turn(calls), len(calls), device)
        eager.warm_up()
        if is_gpu(device):
            try:
                _demand_short(eager)
                graph = Series(capture(calls).replay, len(calls), device)
                graph.warm_up()
                rival.graph = graph
                eager.num_samples = min(eager.num_samples, EAGER_SAMPLES)
            except NotCapturedError as error:
                rival.note = f"not captured: {error}"
        rival.eager, rival.call = eager, calls[0]
    except AbsentError as error:
        rival.note = str(error)
    except ModuleNotFoundError as error:
        rival.note = f"{error.name} is not installed"
    except Exception as error:  # noqa: BLE001 - a peer's error is a row
        rival.note = first_line(error)
    return rival


def _demand_short(series: Series) -> None:
    """Raise NotCapturedError for calls beside which launches are nothing."""
    if series.warm_us > LONG_US:
        message = f"takes {series.warm_us / 1e3:.0f} ms"
        raise NotCapturedError(message)


def max_error(output: Tensor, exact: tuple[Tensor, Tensor]) -> float:
    """Return the largest difference in the rows that are known exactly; NaN if one is NaN."""
    rows, values = exact
    return float((output[rows].double() - values).abs().max())


def peak_bytes(call: Call) -> int:
    """Return the most bytes of the device that a call allocates at once."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _row(
    op: Op[Inputs],
    case: Case[Inputs],
    rival: Rival,
    common: Row | None = None,
    flops: float = 0.0,
) -> Row:
    row: Row = {**dict.fromkeys(ROW_NAMES, ""), **(common or {})}
    row |= {"op": op.name, "model": case.model, "size": case.size, "routing": case.routing}
    row |= {"dtype": str(case.dtype).removeprefix("torch."), "who": rival.name}
    for name, series in (("eager_us", rival.eager), ("graph_us", rival.graph)):
        if series is not None:
            timing = series.timing()
            row |= {name: round(timing.us, 3), "spread": round(timing.spread, 4)}
    took_us = time_of(row)
    if took_us and row["roofline_us"] != "":
        row["fraction"] = round(row["roofline_us"] / took_us, 4)
    if took_us and flops:
        row["tflops"] = round(flops / took_us / 1e6, 2)
    if rival.launches is not None:
        row["launches"] = rival.launches
    if rival.peak_bytes is not None:
        row["peak_mb"] = round(rival.peak_bytes / 1e6, 3)
    if rival.max_error is not None:
        row["max_error"] = f"{rival.max_error:.3g}"
    row["note"] = rival.note
    return row


def _cache_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def _machine(device: str) -> Row:
    name = torch.cuda.get_device_name() if is_gpu(device) else device
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"device": name, "torch": str(torch.__version__), "triton": triton}
