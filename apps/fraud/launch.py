"""Brings the local platform and the workers of the fraud service up and down.

The only module of the application that reaches the platform's processes: a worker is
given its client by ``cluster.workers`` and its share by the plan.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
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

if TYPE_CHECKING:
    from cluster.loading import ModelSource
    from cluster.workers import WorkerGroup

_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What every worker is built from; travels to its process."""

    kafka: KafkaSettings
    settings: ServiceSettings
    policy: Policy
    schemas: Schemas

    def __call__(self, index: int, num_workers: int, client: Client) -> FraudService:
        """Build one worker."""
        settings = replace(self.settings, index=index, num_workers=num_workers)
        scorer = Scorer(client)
        stream = KafkaStream(self.kafka)
        return FraudService(settings, self.schemas, self.policy, scorer, stream)


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
    attach: bool = False,
) -> Iterator["WorkerGroup"]:
    """Run the local platform and the workers until the block ends, then drain them.

    Args:
        plan: What workers are built from.
        num_workers: How many.
        models: Directory of models; None takes the shipped ones.
        device: Where the model runs.
        source: Other models than those in ``models``.
        attach: Use the application of a running cluster; the above are its own business.

    Raises:
        ConfigurationError, CheckpointError, UnavailableError, UnknownModelError: See
            ``cluster.platform``.
    """
    from cluster import platform as processes  # noqa: PLC0415 - ray

    processes.prepare_environment(is_own=not attach)
    from cluster.workers import run_workers  # noqa: PLC0415 - ray reads its settings at import

    if attach:
        platform = processes.attach()
    else:
        config = processes.PlatformConfig(port=None, device=device)
        platform = processes.start(replace(config, models=models) if models else config, source)
    try:
        group = run_workers(plan, num_workers)
        try:
            yield group
        finally:
            group.stop()
    finally:
        platform.stop()


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
    stopping = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopping.set()

    _on_signal(stop)
    with running_service(
        plan, args.workers, models=args.models, device=args.device, attach=args.attach
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
