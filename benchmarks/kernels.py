"""``trimoe bench kernels``: each op of ``kernels`` beside its peers, against the roofline.

A row for each case and each who runs it: time eager and inside a CUDA graph, launches, memory,
least time of the device, largest error.  Our rows are judged by ``kernel_aims``.  Peers are used
where they can be imported; a folder of unpacked wheels on PYTHONPATH is enough.

All ops come first without those peers that compile for seconds, then with them alone: a run that
is cut off has the rest.  The time is shared by the number of cases.

On a GPU each op runs in a process of its own: an op that breaks the device, or compiles beyond
its time, costs its own rows alone.  On a CPU tiny shapes prove that the harness works; their
times mean nothing.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.kernel_aims import judge
from benchmarks.kernel_attention import ATTENTION
from benchmarks.kernel_block_sparse import BLOCK_SPARSE
from benchmarks.kernel_measure import ROW_NAMES, Row, measure_op
from benchmarks.kernel_moe import MOE
from benchmarks.kernel_moe_fp8 import MOE_FP8
from benchmarks.kernel_norm import NORM
from benchmarks.kernel_op import Op
from benchmarks.kernel_routing import ROUTING
from benchmarks.kernel_step import STEP
from benchmarks.kernel_timing import is_gpu
from benchmarks.kernel_trees import TREES
from benchmarks.results import RESULTS, append_row
from cluster.errors import ConfigurationError

OPS: dict[str, Op[Any]] = {  # quick ones first: they leave their time to the others
    op.name: op for op in (NORM, ROUTING, TREES, ATTENTION, BLOCK_SPARSE, MOE, MOE_FP8, STEP)
}
GRACE_S = 45.0  # beyond its time, for what an op has begun
COLUMNS = {  # of the table, and their widths
    "op": 9,
    "model": 24,
    "size": 6,
    "routing": 7,
    "who": 24,
    "eager_us": 10,
    "graph_us": 10,
    "spread": 7,
    "launches": 8,
    "peak_mb": 8,
    "roofline_us": 11,
    "fraction": 8,
    "max_error": 9,
}
TEXTS = ("op", "model", "routing", "who")


def main(args: argparse.Namespace) -> int:
    """Measure the chosen ops; print and append rows as they come; the last line is JSON."""
    if is_gpu(args.device) and not torch.cuda.is_available():
        message = "--device cuda: expected a CUDA device, found none; use --device cpu"
        raise ConfigurationError(message)
    began_s = time.monotonic()
    names = [name for name in OPS if not args.op or name in args.op]
    rows: list[Row] = []
    sys.stdout.write(_line({name: name for name in COLUMNS}) + "\n")
    for row in _all_rows(names, args.device, args.seconds):
        append_row(args.results or RESULTS, "kernels", row)
        sys.stdout.write(f"{_line(row)}  {row['note']}".rstrip() + "\n")
        sys.stdout.flush()
        rows.append(row)
    verdicts = judge(rows)
    for each in verdicts:
        sys.stdout.write(f"{_case(each)}: {each['aim']}: {each['value']}, {each['verdict']}\n")
    if args.json:
        whole = {"rows": rows, "verdicts": verdicts}
        args.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    figures = {
        "device": rows[0]["device"],
        "ops": names,
        "rows": len(rows),
        "aims": Counter(each["verdict"] for each in verdicts),
        "seconds": round(time.monotonic() - began_s, 1),
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


def _all_rows(names: Sequence[str], device: str, seconds: float) -> Iterator[Row]:
    """Yield the rows of all ops, those of compiled peers last."""
    ends_s = time.monotonic() + seconds
    run = run_apart if is_gpu(device) else _run_here
    for is_compiled in (False, True):
        parts = [name for name in names if OPS[name].rivals(is_compiled=is_compiled)]
        counts = [len(OPS[name].cases(device)) for name in parts]
        for position, name in enumerate(parts):
            left_s = max(0.0, ends_s - time.monotonic())
            share_s = left_s * counts[position] / sum(counts[position:])
            yield from run(name, device, share_s, is_compiled=is_compiled)


def _run_here(name: str, device: str, seconds: float, *, is_compiled: bool) -> Iterator[Row]:
    return measure_op(OPS[name], device, seconds, is_compiled=is_compiled)


def run_apart(name: str, device: str, seconds: float, *, is_compiled: bool) -> Iterator[Row]:
    """Yield the rows of an op from a process of its own, which is killed past its time.

    What ended it early is a row.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_send_rows, args=(name, device, seconds, sender), kwargs={"is_compiled": is_compiled}
    )
    process.start()
    sender.close()
    ends_s, is_over = time.monotonic() + seconds + GRACE_S, False
    try:
        while receiver.poll(max(0.0, ends_s - time.monotonic())):
            yield receiver.recv()
        is_over = True
    except EOFError:
        process.join()
    finally:
        process.kill()
        process.join()
    if is_over:
        yield _ended(name, device, f"stopped after {seconds + GRACE_S:.0f} s")
    elif process.exitcode:
        yield _ended(name, device, f"its process ended with {process.exitcode}")


def _send_rows(
    name: str, device: str, seconds: float, sender: Connection, *, is_compiled: bool
) -> None:
    for row in _run_here(name, device, seconds, is_compiled=is_compiled):
        sender.send(row)
    sender.close()


def _ended(name: str, device: str, note: str) -> Row:
    """Return a row in the form of the others that says why no more come."""
    case = {"op": name, "model": "-", "size": 0, "routing": "-", "who": "-", "device": device}
    return {**dict.fromkeys(ROW_NAMES, ""), **case, "note": note}


def _case(row: Row) -> str:
    return f"{row['op']} {row['model']} {row['size']} {row['routing']}"


def _line(row: Row) -> str:
    cells = []
    for name, width in COLUMNS.items():
        text = str(row[name])
        cells.append(text.ljust(width) if name in TEXTS else text.rjust(width))
    return " ".join(cells)
