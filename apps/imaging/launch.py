"""``trimoe imaging run``: brings the platform and the workers of a batch up and down.

The only module of the application that reaches the platform's processes.  What a batch is
about comes in as an ``Application``.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from apps.arguments import write_json
from apps.imaging.batch.driver import Crew, Hire, Outcome, run_batch
from apps.imaging.batch.evidence import default_key_path, fingerprint, signing_key
from apps.imaging.batch.layout import Layout
from apps.imaging.batch.plan import Batch, Shard
from apps.imaging.batch.process import Application, Record
from apps.imaging.batch.progress import progress_on
from apps.imaging.batch.workers import NICENESS, WorkerPlan, WorkerSettings
from cluster.errors import ConfigurationError
from cluster.membership import choose_address, joined

if TYPE_CHECKING:
    from cluster.workers import WorkerGroup

INTERRUPTED = 130
MODEL = "shared"  # that a local platform serves
DRAIN_MARGIN_S = 10.0  # workers end by themselves within ``drain_s``


def run_command(
    args: argparse.Namespace, application: Application, hire: Hire | None = None
) -> int:
    """Run ``trimoe imaging run``.

    Args:
        args: Of ``commands``.
        application: What the batch is about.
        hire: Runs the workers; None takes supervised ones on a platform.

    Raises:
        ConfigurationError, UnavailableError: See ``run_batch``.
        FileNotFoundError: There is no such input.
    """
    root, out = args.input.resolve(strict=True), args.out.resolve()
    if out == root or root in out.parents:
        message = "output directory: expected one outside the input, got one inside"
        raise ConfigurationError(message)
    batch = Batch(
        application=application,
        root=root,
        inventory=application.discover(root),
        out=out,
        shard=Shard.parse(args.shard),
        workers=WorkerSettings(in_flight=args.in_flight),
    )
    key = signing_key(args.key or default_key_path())
    with (
        stop_on_signal(hire or hire_of(args)) as (hire_workers, stopping),
        progress_on(sys.stderr) as show,
    ):
        outcome = run_batch(
            batch, hire_workers, key, is_resumed=args.resume, stopping=stopping, show=show
        )
    write_json(args.json, _figures(outcome))
    if outcome.manifest is None:
        sys.stderr.write(
            f"stopped: {outcome.tally.num_settled} of {outcome.tally.num_cases} cases done; "
            "go on with the same command and --resume\n"
        )
        return INTERRUPTED
    counts = ", ".join(f"{num} {name}" for name, num in outcome.manifest["counts"].items())
    signer = fingerprint(key.public_key())
    sys.stdout.write(f"{counts}; {args.out / Layout(out).manifest.name} signed by {signer}\n")
    return 0


def _figures(outcome: Outcome) -> Record:
    tally = outcome.tally
    return {
        "done": outcome.is_done,
        "cases": tally.num_cases,
        "settled": tally.num_settled,
        "repaired": tally.num_repaired,
        "quarantined": tally.num_quarantined,
        "settled_before": outcome.num_before,
        "seconds": round(outcome.seconds, 3),
        "cases_per_h": round(outcome.cases_per_h, 1),
    }


def hire_of(args: argparse.Namespace) -> Hire:
    """Return what runs workers as the arguments say."""
    address = choose_address(args.address)
    return partial(hired, num_workers=args.workers, device=args.device, address=address)


@contextmanager
def hired(
    plan: WorkerPlan, *, num_workers: int, device: str = "cpu", address: str | None = None
) -> Iterator["WorkerGroup"]:
    """Run the workers, and a platform for them, until the block ends; then drain them.

    Args:
        plan: What workers are built from.
        num_workers: How many.
        device: Where the model runs.
        address: A running cluster whose platform is used; None starts a local one.

    Raises:
        ConfigurationError, CheckpointError, UnknownModelError: See ``cluster.platform`` and
            ``cluster.membership``.
    """
    with ExitStack() as stack:
        if address is not None:
            stack.enter_context(joined(address))
        else:
            from cluster.platform import PlatformConfig, start  # noqa: PLC0415 - ray

            stack.callback(start(PlatformConfig(port=None, device=device, model=MODEL)).stop)
        from cluster.workers import run_workers  # noqa: PLC0415 - ray reads settings at import

        group = run_workers(plan, num_workers, niceness=NICENESS)
        stack.callback(group.stop, plan.settings.drain_s + DRAIN_MARGIN_S)
        yield group


@contextmanager
def stop_on_signal(hire: Hire) -> Iterator[tuple[Hire, threading.Event]]:
    """Yield an event that the first SIGINT or SIGTERM sets; the second one ends the process.

    Ray installs its own handlers while it starts, so ours are installed again once the
    workers are hired: that is why ``hire`` goes in and comes out.
    """
    stopping = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopping.set()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    def install() -> None:
        if not stopping.is_set():
            for number in numbers:
                signal.signal(number, stop)

    @contextmanager
    def hire_and_install(plan: WorkerPlan) -> Iterator[Crew]:
        with hire(plan) as crew:
            install()
            yield crew

    install()
    try:
        yield hire_and_install, stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
