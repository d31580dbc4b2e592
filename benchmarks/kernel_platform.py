"""One platform with the shipped weights, and what three applications see of it.

A process of its own, as the environment of a process says which kernels run there:

    TRIMOE_KERNELS=torch python -m benchmarks.kernel_platform --device cuda --work DIR --json FILE

In turn, so that none disturbs another: the fraud stream through the embedded broker, open loop;
a CT case by the service that the imaging workers run, up to its report; forecasts of a fleet,
several hours in flight, by ``forecast_hour`` and again with the inputs prepared.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from apps.cli import build_parser
from apps.imaging.calibration import FILE, Calibration
from apps.imaging.launch import MODEL
from apps.imaging.outputs.settings import Kind
from apps.imaging.phantom import PhantomShape
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.service import CaseService
from apps.maintenance.demo import NUM_DAYS, read_calibration
from apps.maintenance.forecasts.asking import ask
from apps.maintenance.forecasts.moment import forecast_hour
from apps.maintenance.simulate import SimulationConfig, simulate
from benchmarks.fraud import prepared
from benchmarks.imaging_cases import SERIES, WHOLE_BODY, whole_body
from benchmarks.imaging_rig import OUTPUTS, SHIPPED
from cluster.client import Client
from cluster.errors import ConfigurationError
from kernels.dispatch import environment_impl

SETTLE_S = 2.0  # of the stream, not measured
HOURS_IN_FLIGHT = 4
NUM_HOURS = 8  # of the fleet, its last, over and over
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Args:
        shape: Of the CT series.
        cases: Times that it is read and reported, after a first time that is not counted.
        machines: Of the fleet; a request asks for all of them.
        stream_s: Of the fraud stream.
        forecast_s: Of either way to forecast.
    """

    shape: PhantomShape = WHOLE_BODY
    cases: int = 2
    machines: int = 200
    stream_s: float = 8.0
    forecast_s: float = 2.5


SMALL = Sizes(PhantomShape(), cases=1, machines=20, stream_s=3.0, forecast_s=1.0)


def measure(device: str, rate: float, sizes: Sizes, work: Path) -> Figures:
    """Start a platform, and return what the applications see.

    Raises:
        ConfigurationError: It could not start, or runs other kernels than were asked for.
    """
    words = ["bench", "fraud", "--embedded", "--device", device, "--models", str(SHIPPED)]
    words += ["--rate", str(rate), "--seconds", str(sizes.stream_s), "--settle", str(SETTLE_S)]
    began_s = time.perf_counter()
    with prepared(build_parser().parse_args(words)) as run_stream:
        from cluster.handle import connect_blocking  # noqa: PLC0415 - ray reads settings at import

        start_s, client = time.perf_counter() - began_s, connect_blocking()
        figures: Figures = {"kernels": asyncio.run(client.status())["kernels"]}
        if figures["kernels"] != environment_impl():
            message = f"replica: expected {environment_impl()} kernels, got {figures['kernels']}"
            raise ConfigurationError(message)
        stream = run_stream()
        figures |= {f"fraud_{name}": stream[name] for name in ("p50_ms", "p99_ms", "drops")}
        figures |= case_figures(client, whole_body(work, sizes.shape), work / "case", sizes.cases)
        figures |= asyncio.run(forecast_figures(client, sizes.machines, sizes.forecast_s))
    return {**figures, "start_s": round(start_s, 1)}


def case_figures(client: Client, case: Path, out: Path, num: int) -> Figures:
    """Return the seconds of a case, whole and for the answers of the model; see ``Sizes``."""
    settings = replace(OUTPUTS, kinds=frozenset({Kind.REPORT}))
    service = CaseService(Bounds(), Calibration.load(SHIPPED / MODEL / FILE), settings)
    (source,) = discover(case / SERIES, Bounds()).sources
    whole_s, infer_s = [], []
    for number in range(num + 1):
        began_s = time.perf_counter()
        summary = asyncio.run(service(source, out, client))
        if number:
            whole_s.append(time.perf_counter() - began_s)
            infer_s.append(summary.seconds["infer"])
    return {
        "ct_s": round(statistics.median(whole_s), 3),
        "ct_infer_s": round(statistics.median(infer_s), 3),
    }


async def forecast_figures(client: Client, num_machines: int, seconds: float) -> Figures:
    """Return forecasts a second, end to end and with prepared inputs."""
    calibration = read_calibration(SHIPPED / MODEL)
    fleet = calibration.align(simulate(SimulationConfig(num_machines, NUM_DAYS)))
    hours = range(fleet.num_hours - NUM_HOURS, fleet.num_hours)
    known = [await forecast_hour(client, fleet, hour, calibration) for hour in hours]
    series = [moment.series for moment in known if moment]

    async def end_to_end(hour: int) -> int:
        moment = await forecast_hour(client, fleet, hour, calibration)
        return len(moment.machines) if moment else 0

    async def model_alone(index: int) -> int:
        return int((await ask(client, series[index], calibration)).is_ok.sum())

    return {
        "forecasts_s": round(await rate_of(end_to_end, hours, seconds)),
        "forecasts_prepared_s": round(await rate_of(model_alone, range(len(series)), seconds)),
    }


async def rate_of(
    run: Callable[[int], Awaitable[int]], numbers: Sequence[int], seconds: float
) -> float:
    """Return what calls give in a second, of which some are always in flight.

    Args:
        run: Takes a number, returns how much it did.
        numbers: One after another, over and over.
        seconds: After which no further call begins; those in flight count with their time.
    """
    began_s, endless, done = time.perf_counter(), cycle(numbers), 0

    async def feed() -> None:
        nonlocal done
        while time.perf_counter() < began_s + seconds:
            done += await run(next(endless))

    async with asyncio.TaskGroup() as group:
        for _ in range(HOURS_IN_FLIGHT):
            group.create_task(feed())
    return done / (time.perf_counter() - began_s)


def main() -> int:
    """Measure one platform and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--rate", type=float, required=True, metavar="TX_S")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    figures = measure(args.device, args.rate, SMALL if args.small else Sizes(), args.work)
    args.json.write_text(json.dumps(figures), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
