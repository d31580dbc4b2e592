"""``trimoe demo``: a generated world through Kafka, the shared deployment, and Kafka again.

Part of the world is history: it warms the feature state.  The rest is streamed at a
stated rate with a few broken messages and duplicates, so event time is compressed.
The data is simulated; no figure speaks about real cards.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple, TextIO

from apps.arguments import write_json
from apps.fraud.brokers import EMBEDDED_CLIENT_OPTIONS, EmbeddedBroker, create_topics
from apps.fraud.commands import topics_of
from apps.fraud.decision import load_policy
from apps.fraud.launch import WorkerPlan, check_topics, default_schemas, running_service
from apps.fraud.load import Faults
from apps.fraud.rules import APPROVE, BLOCK, REVIEW
from apps.fraud.settings import ServiceSettings, Topics
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.table import LABEL_COLUMN, read_table, write_table
from apps.fraud.transaction import TransactionSchema
from apps.fraud.transport import KafkaSettings, KafkaStream, read_options
from apps.fraud.trial import LoadProcess, Offer, Outcome, run_trial
from apps.fraud.watch import Answers, Watch, open_watch_stream
from cluster.errors import ConfigurationError

if TYPE_CHECKING:
    from cluster.loading import ModelSource

NUM_PARTITIONS = 4
FAULTS = Faults(malformed=6, duplicates=12)
_LINE_S = 0.5  # between two states of the progress line


class World(NamedTuple):
    """Files of a generated world and the frauds of its streamed part."""

    history: Path
    stream: Path
    frauds: frozenset[int | str]


def generate_world(folder: Path, num_transactions: int, *, seed: int = 0) -> World:
    """Write history and stream of a world whose last transactions are the stream."""
    table = simulate(SimulationConfig(num_days=60, seed=seed))
    if len(table) <= num_transactions:
        message = f"--transactions: expected fewer than {len(table)}, got {num_transactions}"
        raise ConfigurationError(message)
    history, stream = table[:-num_transactions], table[-num_transactions:]
    schema = TransactionSchema()
    write_table(history, folder / "history.parquet", schema)
    write_table(stream, folder / "stream.parquet", schema)
    frauds = stream.loc[stream[LABEL_COLUMN] == 1, "transaction_id"]
    return World(folder / "history.parquet", folder / "stream.parquet", frozenset(frauds.tolist()))


def cut_stream(world: World, num_first: int) -> tuple[Path, Path]:
    """Write the first transactions of the stream and the rest as two files beside it."""
    schema = TransactionSchema()
    table = read_table(world.stream, schema)
    paths = world.stream.with_stem("stream-1"), world.stream.with_stem("stream-2")
    for path, part in zip(paths, (table[:num_first], table[num_first:]), strict=True):
        write_table(part, path, schema)
    return paths


@dataclass
class Phases:
    """How long the parts of a run took."""

    out: TextIO
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a part and say so."""
        begin_s = time.perf_counter()
        self.out.write(f"{name} ...\n")
        self.out.flush()
        yield
        self.seconds[name] = time.perf_counter() - begin_s


def progress_line(out: TextIO) -> Callable[[Answers], None]:
    """Return a callback that rewrites one line with the state of a run."""
    state = {"next_s": 0.0, "last_s": time.perf_counter(), "count": 0.0}

    def show(answers: Answers) -> None:
        now_s = time.perf_counter()
        if now_s < state["next_s"]:
            return
        count = answers.num_decisions + answers.num_dead_letters
        rate = (count - state["count"]) / max(now_s - state["last_s"], 1e-9)
        p50, p99 = answers.quantiles_ms(last=int(rate) + 1)
        out.write(
            f"\r{count:8d} answered  {rate:7.0f} tx/s  p50 {p50:5.0f} ms  p99 {p99:5.0f} ms  "
            f"{answers.by_decision[BLOCK]} blocked  {answers.num_dead_letters} dead letters   "
        )
        out.flush()
        state.update(next_s=now_s + _LINE_S, last_s=now_s, count=float(count))

    return show


def main(args: argparse.Namespace, source: "ModelSource | None" = None) -> int:
    """Run ``trimoe demo``; the exit code is 0 only if every input was answered once."""
    out, phases = sys.stdout, Phases(sys.stdout)
    kafka_config = list(args.kafka_config)
    options = read_options(kafka_config, args.kafka_config_file)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-demo-")))
        with phases.measure("generate"):
            world = generate_world(folder, args.transactions)
        topics = topics_of(args)
        with phases.measure("broker"):
            kafka = open_broker(stack, args.bootstrap_servers, options, topics)
        plan = plan_workers(kafka, topics, world.history, folder / "state")
        with phases.measure("platform"):
            stack.enter_context(
                running_service(plan, args.workers, models=args.models, source=source)
            )
        offer = Offer(world.stream, args.rate, faults=FAULTS)
        with phases.measure("stream"):
            outcome = run_stretch(kafka, kafka_config, topics, offer, progress_line(out))
        begin_s = time.perf_counter()
    phases.seconds["shutdown"] = time.perf_counter() - begin_s
    figures = summarise(outcome, phases)
    _print_summary(out, outcome, world, args.rate, phases)
    write_json(args.json, figures)
    return 0 if figures["inputs"] == outcome.num_answers else 1


def open_broker(
    stack: ExitStack, bootstrap_servers: str | None, options: dict[str, object], topics: Topics
) -> KafkaSettings:
    """Return where the topics are, on the broker that was named or on one of this run.

    Raises:
        ConfigurationError: Nobody answers there.
    """
    names = (topics.transactions, topics.labels, topics.decisions, topics.dead_letters)
    if bootstrap_servers is None:
        bootstrap_servers = stack.enter_context(EmbeddedBroker()).bootstrap_servers
        options = {**EMBEDDED_CLIENT_OPTIONS, **options}
    kafka = KafkaSettings(bootstrap_servers, f"trimoe-demo-{time.time_ns()}", options)
    KafkaStream(kafka).close()  # one clear line if nobody answers
    create_topics(bootstrap_servers, dict.fromkeys(names, NUM_PARTITIONS))
    check_topics(kafka, topics)
    return kafka


def plan_workers(kafka: KafkaSettings, topics: Topics, history: Path, state: Path) -> WorkerPlan:
    """Return what the workers of a demo are built from."""
    settings = ServiceSettings(topics=topics, warm_from=history, state_dir=state)
    return WorkerPlan(kafka, settings, load_policy(), default_schemas())


def run_stretch(
    kafka: KafkaSettings,
    kafka_config: Sequence[str],
    topics: Topics,
    offer: Offer,
    progress: Callable[[Answers], object],
) -> Outcome:
    """Stream a table through running workers to its last answer.

    Raises:
        RuntimeError: See ``run_trial``.
    """
    with closing(open_watch_stream(kafka)) as stream:
        watch = Watch(stream, topics, from_start=False)
        process = LoadProcess(kafka.bootstrap_servers, kafka_config, topics, offer)
        try:
            return run_trial(process, watch, offer, progress=progress)
        finally:
            process.stop()


def summarise(outcome: Outcome, phases: Phases) -> dict[str, object]:
    """Return the figures of ``--json``."""
    p50, p99 = outcome.answers.quantiles_ms(after_ms=outcome.begin_ms)
    return {
        "inputs": outcome.inputs,
        "decisions": outcome.answers.num_decisions,
        "dead_letters": outcome.answers.num_dead_letters,
        "tx_per_s": outcome.tx_per_s,
        "p50_ms": p50,
        "p99_ms": p99,
        "seconds": sum(phases.seconds.values()),
    }


def _print_summary(
    out: TextIO, outcome: Outcome, world: World, rate: float, phases: Phases
) -> None:
    answers = outcome.answers
    p50, p99 = answers.quantiles_ms(after_ms=outcome.begin_ms)
    by_decision = "  ".join(
        f"{name} {answers.by_decision[name]}" for name in (APPROVE, REVIEW, BLOCK)
    )
    by_error = "  ".join(f"{name} {count}" for name, count in sorted(answers.by_error.items()))
    caught = answers.num_caught(world.frauds)
    times = "  ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.seconds.items())
    out.write(
        f"\n\ninputs        {outcome.inputs}\n"
        f"decisions     {answers.num_decisions}  ({by_decision}; {answers.repeats} repeated)\n"
        f"dead letters  {answers.num_dead_letters}  ({by_error})\n"
        f"rate          {outcome.tx_per_s:.0f} tx/s answered, {rate:.0f} tx/s asked for; "
        f"event time is compressed\n"
        f"latency       p50 {p50:.0f} ms  p99 {p99:.0f} ms, Kafka timestamp to decision\n"
        f"fraud         {caught} of {len(world.frauds)} simulated frauds reviewed or blocked\n"
        f"phases        {times}\n"
    )
    if outcome.num_answers != outcome.inputs:
        out.write(f"MISSING       {outcome.inputs - outcome.num_answers} inputs have no answer\n")
