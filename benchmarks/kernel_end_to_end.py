"""What the kernels are worth end to end: three applications with them and without them.

    python -m benchmarks.kernel_end_to_end --device cuda --json FILE

On: Triton forms, in captured CUDA graphs.  Off, ``TRIMOE_KERNELS=torch``: the torch forms of the
same ops, launched one by one, as they read loads on the host.  Each is a platform of its own
(``kernel_platform``), in alternating order; a row for each, and a table of the medians.  A CPU
has torch forms alone, and is measured once.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from benchmarks.imaging_cases import whole_body
from benchmarks.imaging_rig import ROOT
from benchmarks.kernel_platform import SMALL, Sizes
from benchmarks.results import RESULTS, append_row
from cluster.errors import ConfigurationError, TrimoeError
from kernels.dispatch import VARIABLE

Way = Literal["on", "off"]
Row = dict[str, Any]
VALUES: Mapping[Way, str] = {"on": "auto", "off": "torch"}
ROUNDS: Sequence[Sequence[Way]] = (("on", "off"), ("off", "on"))
GRACE_S = 60.0  # beyond the time, for a platform that has begun


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a platform.

    Args:
        label: For readers.
        is_rate: Whether more is better.
    """

    label: str
    is_rate: bool = False

    def gain(self, on: float, off: float) -> float:
        """Return how many times better it is with the kernels."""
        better, worse = (on, off) if self.is_rate else (off, on)
        return better / worse


METRICS: Mapping[str, Metric] = {
    "fraud_p50_ms": Metric("fraud, p50, ms"),
    "fraud_p99_ms": Metric("fraud, p99, ms"),
    "ct_s": Metric("CT, seconds a case to its report"),
    "ct_infer_s": Metric("CT, of these for the model"),
    "forecasts_s": Metric("forecasts a second", is_rate=True),
    "forecasts_prepared_s": Metric("forecasts a second, inputs prepared", is_rate=True),
    "start_s": Metric("start of broker and platform, s"),
}


def main() -> int:
    """Measure, print a table, append rows; the last line is JSON; 1 if transactions were lost."""
    args = _parser().parse_args()
    try:
        rows = _measure(args)
    except TrimoeError as error:
        raise SystemExit(f"error: {error}") from error
    medians = medians_of(rows)
    print("\n".join(table(medians)))
    figures = {"device": rows[0]["device"], "rounds": rows[-1]["round"], **medians}
    if args.json:
        args.json.write_text(json.dumps({**figures, "rows": rows}, indent=2) + "\n", "utf-8")
    print(json.dumps(figures))
    return int(any(row["fraud_drops"] for row in rows))


def _measure(args: argparse.Namespace) -> list[Row]:
    """Append and return the rows."""
    if args.device == "cuda" and not torch.cuda.is_available():
        message = "--device cuda: expected a CUDA device, found none; use --device cpu"
        raise ConfigurationError(message)
    rows: list[Row] = []
    with TemporaryDirectory(prefix="trimoe-bench-") as folder:
        work = (args.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        ends_s = time.monotonic() + args.seconds
        whole_body(work, (SMALL if args.small else Sizes()).shape)

        def run(way: Way) -> Row:
            return run_apart(args, way, work, ends_s + GRACE_S - time.monotonic())

        for way, number, row in measure_rounds(run, ways_of(args.device), ends_s):
            shown = {"way": way, "round": number, "device": _device(args), "rate": args.rate}
            rows.append({**shown, "small": args.small, **row})
            append_row(args.results or RESULTS, "kernels_end_to_end", rows[-1])
            print(f"\n{json.dumps(rows[-1])}", file=sys.stderr, flush=True)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rate", type=float, default=500.0, metavar="TX_S", help="of the stream")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="in which a second round must fit"
    )
    parser.add_argument("--small", action="store_true", help="sizes that prove that it runs")
    parser.add_argument("--work", type=Path, metavar="DIR", help="the generated case is reused")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def ways_of(device: str) -> Sequence[Sequence[Way]]:
    """Return the ways of each round."""
    if device == "cuda":
        return ROUNDS
    print("the CPU has one form of each op, the torch one: measured once")
    return (("on",),)


def measure_rounds(
    run: Callable[[Way], Row],
    rounds: Sequence[Sequence[Way]],
    ends_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Way, int, Row]]:
    """Yield rows with their way and round; the first round, and others that should end in time.

    The quickest way so far says how long each will take: the first one may have compiled.
    """
    took_s: list[float] = []
    for number, ways in enumerate(rounds, 1):
        if took_s and clock() + len(ways) * min(took_s) > ends_s:
            return
        for way in ways:
            began_s = clock()
            row = run(way)
            took_s.append(clock() - began_s)
            yield way, number, row


def run_apart(args: argparse.Namespace, way: Way, work: Path, patience_s: float) -> Row:
    """Return the figures of a platform in a process of its own.

    Raises:
        ConfigurationError: It failed, or did not end in time.
    """
    found = work / f"{way}.json"
    command = [sys.executable, "-m", "benchmarks.kernel_platform", "--device", args.device]
    command += ["--rate", str(args.rate), "--work", str(work), "--json", str(found)]
    command += ["--small"] if args.small else []
    process = subprocess.Popen(  # noqa: S603 - our own module
        command, cwd=ROOT, env={**os.environ, VARIABLE: VALUES[way]}, stdout=sys.stderr
    )
    try:
        status: int | str = process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so that it ends what it has started
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        process.kill()
        status = f"nothing within {patience_s:.0f} s"
    if status != 0:
        message = f"kernels {way}: expected figures, got {status}; its own message is above"
        raise ConfigurationError(message)
    row: Row = json.loads(found.read_text("utf-8"))
    return row


def medians_of(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return each metric by way, and with both ways how many times better it is with kernels."""
    found: dict[str, dict[str, float]] = {}
    for name, metric in METRICS.items():
        values: dict[str, list[float]] = {}
        for row in rows:
            values.setdefault(row["way"], []).append(row[name])
        middle = {way: round(statistics.median(each), 3) for way, each in values.items()}
        if middle.keys() == VALUES.keys():
            middle["gain"] = round(metric.gain(middle["on"], middle["off"]), 2)
        found[name] = middle
    return found


def table(medians: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield the lines of a table."""
    columns = [name for name in ("on", "off", "gain") if name in medians["ct_s"]]
    yield f"{'kernels':38}" + "".join(f"{name:>10}" for name in columns)
    for name, found in medians.items():
        yield f"{METRICS[name].label:38}" + "".join(f"{found[each]:>10}" for each in columns)


def _device(args: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if args.device == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())
