"""Brings the platform, local or of a running cluster, and the workers of the service up and down.

The only module of the application that reaches the platform's processes: a worker is
given its client by ``cluster.workers`` and its share by the plan.
"""

import argparse
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import TYPE_CHECKING

from apps.fraud.commands import topics_of
from apps.fraud.decision import Policy, load_policy
from apps.fraud.intake import Schemas
from apps.fraud.labels import LabelSchema
from apps.fraud.scoring import Scorer
from apps.fraud.service import FraudService
from apps.fraud.settings import FIVE_MINUTES_MS, ServiceSettings, Topics
from apps.fraud.transaction import TransactionSchema
from apps.fraud.transport import KafkaSettings, KafkaStream, read_options
from cluster.client import Client
from cluster.errors import ConfigurationError
from cluster.membership import choose_address, joined

if TYPE_CHECKING:
    from cluster.loading import ModelSource
    from cluster.workers import WorkerGroup

_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What every worker is built from; travels to its process.

    Args:
        kafka: Where the log is.
        settings: Of all workers; each gets its index.
        policy: Thresholds and rules.
        schemas: How messages are read.
        history: Content of ``settings.warm_from``, for nodes that do not have that file.
    """

    kafka: KafkaSettings
    settings: ServiceSettings
    policy: Policy
    schemas: Schemas
    history: bytes | None = None

    def __call__(self, index: int, num_workers: int, client: Client) -> FraudService:
        """Build one worker."""
        settings = replace(self.settings, index=index, num_workers=num_workers)
        scorer = Scorer(client)
        stream = KafkaStream(self.kafka)
        if self.history is None or settings.warm_from is None:
            return FraudService(settings, self.schemas, self.policy, scorer, stream)
        folder = Path(mkdtemp(prefix="trimoe-history-"))
        unpacked = folder / settings.warm_from.name
        unpacked.write_bytes(self.history)
        settings = replace(settings, warm_from=unpacked)
        service = FraudService(settings, self.schemas, self.policy, scorer, stream)
        weakref.finalize(service, shutil.rmtree, folder, ignore_errors=True)
        return service


def default_schemas() -> Schemas:
    """Return how messages with the handbook's names are read."""
    return Schemas(TransactionSchema(), LabelSchema())


def check_topics(kafka: KafkaSettings, topics: Topics) -> Mapping[str, int]:
    """Return the number of partitions of all four topics.

    Raises:
        ConfigurationError: No broker answers, or a topic is missing.
    """
    names = (topics.transactions, topics.labels, topics.decisions, topics.dead_letters)
    with closing(KafkaStream(kafka)) as stream:
        return {name: len(stream.partitions(name)) for name in names}


@contextmanager
def running_service(
    plan: WorkerPlan,
    num_workers: int,
    *,
    models: str | None = None,
    device: str = "cpu",
    source: "ModelSource | None" = None,
    address: str | None = None,
) -> Iterator["WorkerGroup"]:
    """Run the workers, and a platform for them, until the block ends; then drain them.

    Args:
        plan: What workers are built from.
        num_workers: How many.
        models: Directory of models; None takes the shipped ones.
        device: Where the model runs.
        source: Other models than those in ``models``.
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

            config = PlatformConfig(port=None, device=device)
            config = replace(config, models=models) if models else config
            stack.callback(start(config, source).stop)
        from cluster.workers import run_workers  # noqa: PLC0415 - ray reads settings at import

        group = run_workers(plan, num_workers)
        stack.callback(group.stop)
        yield group


def run_command(args: argparse.Namespace) -> int:
    """Run ``trimoe fraud run`` until SIGINT or SIGTERM."""
    options = read_options(args.kafka_config, args.kafka_config_file)
    kafka = KafkaSettings(args.bootstrap_servers, args.group, options)
    topics = topics_of(args)
    partitions = check_topics(kafka, topics)[topics.transactions]
    settings = ServiceSettings(
        topics=topics,
        reorder_wait_ms=args.reorder_wait_ms,
        max_request_size=args.max_request_size,
        max_in_flight=args.max_in_flight,
        max_ahead_ms=None if args.replay else FIVE_MINUTES_MS,
        snapshot_period_s=args.snapshot_s,
        state_dir=args.state.resolve(),
        warm_from=args.warm_from and args.warm_from.resolve(),
        profile_dir=args.profile and args.profile.resolve(),
    )
    plan = WorkerPlan(kafka, settings, load_policy(args.policy), default_schemas())
    address = choose_address(args.address)
    if address is not None:
        if args.models is not None:
            message = f"expected --models or a running cluster, got both; {address} has its model"
            raise ConfigurationError(message)
        if settings.warm_from is not None:
            plan = replace(plan, history=settings.warm_from.read_bytes())
    stopping = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopping.set()

    _on_signal(stop)
    with running_service(
        plan, args.workers, models=args.models, device=args.device, address=address
    ) as group:
        _on_signal(stop)  # Ray installs its own while it starts, and would end without a drain
        sys.stderr.write(
            f"{args.workers} workers on {partitions} partitions of {topics.transactions}; "
            "stop with Ctrl-C\n"
        )
        while not stopping.wait(_LOOK_S):
            group.wait(timeout_s=0.0)  # raises when a worker was given up
    return 0


def _on_signal(stop: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
