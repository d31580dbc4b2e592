"""What our ops must achieve on one H200, as data: at least, and at best.

An aim on time holds inside a CUDA graph where the call can be captured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernel_attention_peers import FA3_WINDOW
from benchmarks.kernel_block_sparse import CUDNN_DENSE
from benchmarks.kernel_op import OURS

Row = Mapping[str, Any]
AT_MOST = ("us", "launches", "times_peer")  # of the other metrics more is better


@dataclass(frozen=True, slots=True)
class Aim:
    """A bound on one metric of an op.

    Args:
        op: As on the command line.
        model: First letters of the case's model.
        sizes: Smallest and largest size of a case that it holds for.
        metric: "us", "launches", "fraction" of the roofline, "tflops" or "times_peer".
        least: What must be reached.
        stretch: What would be better.
        peer: For "times_peer": whose time is the measure.
    """

    op: str
    model: str
    sizes: tuple[int, int]
    metric: str
    least: float
    stretch: float | None = None
    peer: str = ""

    def holds_for(self, row: Row) -> bool:
        """Tell whether the row is of such a case."""
        is_named = row["op"] == self.op and str(row["model"]).startswith(self.model)
        return is_named and self.sizes[0] <= int(row["size"]) <= self.sizes[1]

    def verdict(self, value: float) -> str:
        """Return "missed", "met" or "stretch"."""
        reached = [self._is_reached(value, bound) for bound in (self.least, self.stretch)]
        return "stretch" if all(reached) else "met" if reached[0] else "missed"

    def _is_reached(self, value: float, bound: float | None) -> bool:
        if bound is None:
            return False
        return value <= bound if self.metric in AT_MOST else value >= bound

    def __str__(self) -> str:
        sign = "<=" if self.metric in AT_MOST else ">="
        name = f"times {self.peer}" if self.peer else self.metric
        better = "" if self.stretch is None else f", stretch {self.stretch:g}"
        return f"{name} {sign} {self.least:g}{better}"


AIMS: Sequence[Aim] = (
    Aim("routing", "qwen3", (1, 256), "us", 8, 5),
    Aim("routing", "qwen3", (1, 256), "launches", 1),
    Aim("moe", "qwen3", (64, 1024), "fraction", 0.75, 0.88),
    Aim("moe", "qwen3", (16384, 16384), "tflops", 500, 600),
    Aim("moe", "mixtral", (1, 256), "fraction", 0.85, 0.92),
    Aim("moe", "mixtral", (16384, 16384), "fraction", 0.70, 0.78),
    Aim("moe", "base", (16, 1024), "fraction", 0.60, 0.80),
    Aim("moe", "large", (16, 1024), "fraction", 0.60, 0.80),
    Aim("moe_fp8", "qwen3", (64, 256), "fraction", 0.75, 0.80),
    Aim("moe_fp8", "qwen3", (16384, 16384), "tflops", 950, 1150),
    Aim("attention", "window 1024+64 H16 D128", (65536, 65536), "us", 1600, 1100),
    Aim(
        "attention",
        "window 1024+64 H16 D128",
        (65536, 65536),
        "times_peer",
        1.25,
        peer=FA3_WINDOW,
    ),
    Aim(
        "block_sparse",
        "dropped H16 D128",
        (65536, 65536),
        "times_peer",
        1 / 3,
        1 / 5,
        peer=CUDNN_DENSE,
    ),
    Aim(
        "block_sparse",
        "dropped H16 D128",
        (131072, 131072),
        "times_peer",
        1 / 5,
        1 / 8,
        peer=CUDNN_DENSE,
    ),
    Aim("norm", "D=4096", (16384, 16384), "fraction", 0.93, 0.96),
    Aim("trees", "300x4", (65536, 65536), "us", 1000, 300),
    Aim("step", "base mixed", (256, 8192), "launches", 4 * 10 + 2, 4 * 6 + 2),  # blocks, and after
    Aim("step", "large mixed", (256, 8192), "launches", 16 * 10 + 2, 16 * 6 + 2),
)


def is_aimed(op: str, model: str, size: int) -> bool:
    """Tell whether an aim speaks of the case."""
    return any(aim.holds_for({"op": op, "model": model, "size": size}) for aim in AIMS)


def judge(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a verdict for each of our rows and each aim that holds for it.

    An aim whose metric was not measured is "not measured".
    """
    verdicts = []
    for row in rows:
        if row["who"] != OURS:
            continue
        for aim in AIMS:
            if aim.holds_for(row):
                value = _value(aim, row, rows)
                said = "not measured" if value is None else aim.verdict(value)
                case = {name: row[name] for name in ("op", "model", "size", "routing")}
                verdicts.append({**case, "aim": str(aim), "value": value, "verdict": said})
    return verdicts


def time_of(row: Row) -> float | None:
    """Return the time inside a graph, else the eager one; None if there is neither."""
    for name in ("graph_us", "eager_us"):
        if row[name] not in ("", None):
            return float(row[name])
    return None


def _value(aim: Aim, row: Row, rows: Sequence[Row]) -> float | None:
    if aim.metric == "us":
        return time_of(row)
    if aim.metric != "times_peer":
        return None if row[aim.metric] in ("", None) else float(row[aim.metric])
    case = ("op", "model", "size", "routing")
    own, rival = time_of(row), None
    for other in rows:
        if other["who"] == aim.peer and all(other[name] == row[name] for name in case):
            rival = time_of(other)
    if own is None or rival is None or math.isclose(rival, 0.0):
        return None
    return round(own / rival, 3)
