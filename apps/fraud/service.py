"""One worker of the fraud service: poll, decode, advance the state, score, decide, send.

Every worker reads every partition of the transactions and labels topics, advances
its feature state by all of them in event-time order, and answers the partitions it
owns.  Up to ``max_in_flight`` requests are computed while the next poll is taken
in; answers leave in order.  A worker that dies is simply started again: it reads
its snapshot, catches up without answering twice, and goes on.
"""

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from apps.fraud.decision import Policy
from apps.fraud.delivery import Delivery, Step
from apps.fraud.features import Features
from apps.fraud.intake import Intake, Schemas
from apps.fraud.ledger import recover_ledger
from apps.fraud.pace import Pace
from apps.fraud.recovery import LogView, Snapshot, find_start
from apps.fraud.scoring import Scorer, Scores
from apps.fraud.settings import ServiceSettings
from apps.fraud.stages import StageClock, write_report
from apps.fraud.state import FeatureState
from apps.fraud.stream import Record, Stream, TopicPartition
from apps.fraud.transaction import TransactionSchema

logger = logging.getLogger(__name__)


def now_ms() -> int:
    """Return milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@dataclass
class FraudService:
    """Scores one share of a transactions topic until stopped.

    Args:
        settings: Topics, share, limits.
        schemas: How messages are read.
        policy: Thresholds and rules.
        scorer: Asks the model.
        stream: The log; closed by the service.
        now_ms: Milliseconds since the epoch.
    """

    settings: ServiceSettings
    schemas: Schemas
    policy: Policy
    scorer: Scorer
    stream: Stream
    now_ms: Callable[[], int] = now_ms
    stages: StageClock = field(default_factory=StageClock)
    _stopping: bool = False
    _num_requests: int = 0

    def request_stop(self) -> None:
        """Ask ``run`` to answer what it has taken in and return."""
        self._stopping = True

    async def run(self) -> None:
        """Serve until ``request_stop``.

        Raises:
            ConfigurationError: A topic is missing or the warm-up table cannot be read.
        """
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "stream") as thread:
            try:
                intake, delivery = await loop.run_in_executor(thread, self._recover)
                gc.collect()
                gc.freeze()  # or full collections walk modules and state: .2 s each
                steps: asyncio.Queue[Step | None] = asyncio.Queue()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._take_all(intake, delivery, steps, thread))
                    tasks.create_task(_deliver_all(steps, delivery))
            finally:
                await loop.run_in_executor(thread, self.stream.close)
        if self.settings.profile_dir is not None:
            write_report(self.settings.profile_dir, self.settings.index, self.stages)

    def _recover(self) -> tuple[Intake, Delivery]:
        settings, topics = self.settings, self.settings.topics
        log = _view(self.stream, settings)
        start = find_start(
            settings.worker_dir, log, partial(_fresh_state, settings, self.schemas.transactions)
        )
        ledger = recover_ledger(
            self.stream,
            (topics.decisions, topics.dead_letters),
            start.open_from,
            settings.ledger_size,
        )
        self.stream.assign(start.positions)
        intake = Intake(settings, self.schemas, start, ledger, self.stages)
        delivery = Delivery(
            self.stream,
            topics,
            self.policy,
            ledger,
            intake.answered,
            settings.worker_dir,
            self.stages,
            self.now_ms,
        )
        return intake, delivery

    async def _take_all(
        self,
        intake: Intake,
        delivery: Delivery,
        steps: asyncio.Queue[Step | None],
        thread: ThreadPoolExecutor,
    ) -> None:
        loop = asyncio.get_running_loop()
        slots = asyncio.Semaphore(self.settings.max_in_flight)
        snapshot_at_s = loop.time() + self.settings.snapshot_period_s
        while not self._stopping:
            with self.stages.measure("poll"):
                polled = await loop.run_in_executor(thread, intake.poll, self.stream)
            intake.take(polled)
            for step in intake.steps(self.now_ms()):
                if step.features is not None:
                    await slots.acquire()  # what comes meanwhile makes the next request larger
                    step.scores = self._ask(step.records[0], step.features, intake.pace)
                    step.scores.add_done_callback(lambda _: slots.release())
                steps.put_nowait(step)
            if loop.time() >= snapshot_at_s:
                snapshot_at_s = loop.time() + self.settings.snapshot_period_s
                steps.put_nowait(Step(snapshot=self._cut(intake)))
            delivery.settle()
        steps.put_nowait(Step(snapshot=self._cut(intake)))
        steps.put_nowait(None)

    def _ask(self, first: Record, features: Features, pace: Pace) -> "asyncio.Task[Scores]":
        self._num_requests += 1
        request_id = (
            f"fraud-{self.settings.index}-{first.partition}-{first.offset}-{self._num_requests}"
        )

        async def score() -> Scores:
            begin_s = time.perf_counter()
            scores = await self.scorer.score(features, request_id)
            pace.observe(1e3 * (time.perf_counter() - begin_s))
            return scores

        return asyncio.create_task(score())

    def _cut(self, intake: Intake) -> Snapshot:
        with self.stages.measure("snapshot", 1):
            owned = frozenset(intake.answered.positions())
            return Snapshot(intake.state.snapshot(), intake.read.positions(), owned)


async def _deliver_all(steps: asyncio.Queue[Step | None], delivery: Delivery) -> None:
    while (step := await steps.get()) is not None:
        await delivery.deliver(step)
    await delivery.drain()


def _fresh_state(settings: ServiceSettings, schema: TransactionSchema) -> FeatureState:
    if settings.warm_from is None:
        return FeatureState(schema.minor_units)
    return FeatureState.warm(schema.read_table(settings.warm_from), schema.minor_units)


def _view(stream: Stream, settings: ServiceSettings) -> LogView:
    bounds: dict[TopicPartition, tuple[int, int]] = {}
    committed: dict[TopicPartition, int] = {}
    for topic in (settings.topics.labels, settings.topics.transactions):
        commits = stream.committed(topic)
        for partition, (first, after) in stream.bounds(topic).items():
            tp = TopicPartition(topic, partition)
            bounds[tp] = (first, after)
            if partition % settings.num_workers == settings.index:
                offset = commits.get(partition, first)
                committed[tp] = offset if first <= offset <= after else first
    return LogView(bounds, committed)
