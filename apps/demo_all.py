"""``trimoe demo --all``: a fraud stream, a CT batch and forecasts on one model at once.

One local platform serves one checkpoint that holds the three tasks.  The stream runs alone
first, then beside the others, so that what it pays for their company is measured.  Composition:
the three applications do not know each other, and this module knows them all.

Everything is generated; no figure speaks about real cards, people or machines.
"""

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TextIO

from apps.arguments import write_json
from apps.demo_board import Board
from apps.demo_result import Company, Result, summary
from apps.demo_view import Screen, Steps
from apps.fraud import demo as fraud
from apps.fraud.commands import topics_of
from apps.fraud.transport import read_options
from apps.fraud.trial import Offer, Outcome
from apps.imaging import demo as imaging
from apps.imaging.batch.driver import Crew
from apps.imaging.batch.driver import Outcome as BatchOutcome
from apps.imaging.batch.workers import NICENESS, WorkerPlan
from apps.maintenance import demo as maintenance
from cluster.errors import ConfigurationError
from cluster.platform import PlatformConfig, start
from cluster.registry import ModelEntry, Registry

TASKS = ("fraud", "organs", "forecast")
ALONE_SHARE = 1 / 3  # of the transactions
CASE_S = 4.0  # that one case takes beside the stream, two cores
PERIOD_S = 0.4  # from one hour of the fleet to the next
LOOK_S = 0.2
WARM_UP = 200  # transactions
IMAGING_WORKERS = 1
DRAIN_S = 30.0


class Size(NamedTuple):
    """How much of everything, so that it takes about as long as the stream.

    Args:
        alone: Transactions before the others begin.
        cases: Of the CT batch.
        hours: Of the fleet that are forecast.
    """

    alone: int
    cases: int
    hours: int

    @classmethod
    def beside(cls, transactions: int, rate_tx_s: float) -> "Size":
        """Return what goes with a stream."""
        alone = round(transactions * ALONE_SHARE)
        seconds = (transactions - alone) / rate_tx_s
        return cls(alone, max(2, round(seconds / CASE_S)), max(2, round(seconds / PERIOD_S)))


class Demo:
    """The parts of a run, in the order in which they are used.

    Args:
        args: Of the command line.
        model: What is served.
        folder: Where everything lies.
        out: Takes what is said.

    Raises:
        ConfigurationError: A calibration is missing beside the weights.
    """

    board: Board

    def __init__(
        self, args: argparse.Namespace, model: ModelEntry, folder: Path, out: TextIO
    ) -> None:
        self._args, self._model, self._folder, self._out = args, model, folder, out
        self._size = Size.beside(args.transactions, args.rate)
        self._organs = imaging.read_calibration(model.path)
        self._forecast = maintenance.read_calibration(model.path)
        self._topics = topics_of(args)

    def generate(self) -> None:
        """Write transactions and CT cases, and think up a fleet."""
        self._say("generate ...")
        self._world = fraud.generate_world(self._folder, self._args.transactions)
        self._tables = fraud.cut_stream(self._world, self._size.alone)
        imaging.write_cases(self._size.cases, self._folder / "studies")
        self._fleet = maintenance.make_fleet(self._forecast)

    def start(self, stack: ExitStack) -> None:
        """Start broker, platform and the workers of the stream, until the stack is closed."""
        args, model = self._args, self._model
        self._say(f"start {model.version} with {', '.join(model.tasks)} ...")
        options = read_options(list(args.kafka_config), args.kafka_config_file)
        self._kafka = fraud.open_broker(stack, args.bootstrap_servers, options, self._topics)
        config = PlatformConfig(port=None, models=str(model.path.parent), model=model.version)
        self._platform = start(config)
        stack.callback(self._platform.stop)
        from cluster.workers import run_workers  # noqa: PLC0415 - ray reads settings at import

        state = self._folder / "state"
        plan = fraud.plan_workers(self._kafka, self._topics, self._world.history, state)
        stack.callback(run_workers(plan, args.workers).stop)
        self.board = Board(Screen(self._out), lambda: asyncio.run(self._platform.client.status()))

    def run_alone(self) -> Outcome:
        """Run the first stretch of the stream."""
        self._say(f"the stream alone: {self._size.alone} transactions ...")
        outcome = self.run_stretch(0)
        self.board.screen.leave()
        self.board.wanted_forecasts = self._fleet.num_machines * self._size.hours
        self._say(
            f"all at once: {self._args.transactions - self._size.alone} transactions, "
            f"{self._size.cases} CT cases, {self._fleet.num_machines} machines over "
            f"{self._size.hours} hours ..."
        )
        return outcome

    def run_stretch(self, number: int) -> Outcome:
        """Run a stretch of the stream to its last answer."""
        sizes = self._size.alone, self._args.transactions - self._size.alone
        warm_up = min(WARM_UP, sizes[number] // 20)  # ends before the first fault
        offer = Offer(self._tables[number], self._args.rate, warm_up, fraud.FAULTS)
        return fraud.run_stretch(
            self._kafka, self._args.kafka_config, self._topics, offer, self.board.take_answers
        )

    def run_cases(self, stopping: threading.Event) -> tuple[BatchOutcome, float]:
        """Run the CT batch; return what came of it, and when, in milliseconds since 1970."""
        outcome = imaging.run_cases(
            self._folder / "studies",
            self._folder / "results",
            self._organs,
            imaging.Desk(hire_workers, stopping, self.board.take_tally),
        )
        return outcome, time.time() * 1e3

    def ask_hours(self, stopping: threading.Event) -> Sequence[float]:
        """Ask for the forecasts; return how long each took, in milliseconds."""
        plan = maintenance.Round(self._fleet, self._size.hours, PERIOD_S)
        show = self.board.take_forecasts
        return asyncio.run(
            maintenance.ask_hours(self._platform.client, plan, self._forecast, stopping, show)
        )

    def _say(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


def main(args: argparse.Namespace) -> int:
    """Run ``trimoe demo --all``; the exit code is 0 only if all of it was answered."""
    out, began_s = sys.stdout, time.perf_counter()
    model = find_model(args.models)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-demo-")))
        demo = Demo(args, model, folder, out)
        demo.generate()
        demo.start(stack)
        alone = demo.run_alone()
        board, before_s = demo.board, time.perf_counter()
        before = board.look()
        with beside(demo.run_cases, demo.ask_hours) as (cases, hours):
            outcome = demo.run_stretch(1)
            while not (cases.done() and hours.done()):
                board.refresh()
                time.sleep(LOOK_S)
        steps = Steps.between(before, board.look(), time.perf_counter() - before_s)
        batch, ended_ms = cases.result()
        company = Company(batch, ended_ms, hours.result(), board.wanted_forecasts)
    seconds = time.perf_counter() - began_s
    result = Result(alone, outcome, company, steps, board.processes, seconds)
    figures = result.figures()
    out.write("\n".join(summary(figures, result)) + "\n")
    write_json(args.json, figures)
    return 0 if result.is_complete else 1


def find_model(models: str | None) -> ModelEntry:
    """Return the stable model of a folder, if it serves all three applications.

    Raises:
        ConfigurationError: It lacks a task; or see ``Registry``.
    """
    registry = Registry(str(Path(models or "models").resolve()))
    entry = registry.fetch(registry.aliases().stable)
    missing = [task for task in TASKS if task not in entry.tasks]
    if missing:
        message = (
            f"models: expected one with the tasks {', '.join(TASKS)}, got {entry.version} "
            f"without {', '.join(missing)}; pass --models"
        )
        raise ConfigurationError(message)
    return entry


@contextmanager
def hire_workers(plan: WorkerPlan) -> Iterator[Crew]:
    """Run the workers of a batch on the platform that is up; then drain them."""
    from cluster.workers import run_workers  # noqa: PLC0415 - ray reads settings at import

    group = run_workers(plan, IMAGING_WORKERS, niceness=NICENESS)
    try:
        yield group
    finally:
        group.stop(DRAIN_S)


@contextmanager
def beside(*jobs: Callable[[threading.Event], Any]) -> Iterator[Sequence["Future[Any]"]]:
    """Run jobs in threads while the block does; they are told to stop if it fails."""
    stopping = threading.Event()
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="beside") as pool:
        try:
            yield [pool.submit(job, stopping) for job in jobs]
        except BaseException:
            stopping.set()
            raise
