"""``trimoe bench fraud``: open-loop load through Kafka, the platform, and Kafka again.

A separate process sends on a fixed schedule and never waits for answers.  Latency is
taken between Kafka's timestamps of a transaction and of its decision; the first
``--settle`` seconds are left out.  Transactions are generated and event time is
compressed to the offered rate.  Drops are inputs without an answer.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from apps.fraud.brokers import EMBEDDED_CLIENT_OPTIONS, EmbeddedBroker
from apps.fraud.decision import load_policy
from apps.fraud.demo import generate_world, progress_line
from apps.fraud.launch import WorkerPlan, default_schemas, running_service
from apps.fraud.settings import ServiceSettings
from apps.fraud.transport import KafkaSettings, read_options
from apps.fraud.trial import LoadProcess, Offer, Outcome, run_trial
from apps.fraud.watch import Watch, open_watch_stream
from benchmarks.fraud_rig import make_topics
from benchmarks.real_kafka import RealKafka
from benchmarks.results import RESULTS, append_row

if TYPE_CHECKING:
    from cluster.loading import ModelSource


def measure(args: argparse.Namespace, source: "ModelSource | None" = None) -> dict[str, float]:
    """Run one measurement and return its figures."""
    with prepared(args, source) as run:
        return run()


@contextmanager
def prepared(
    args: argparse.Namespace, source: "ModelSource | None" = None
) -> Iterator[Callable[[], dict[str, float]]]:
    """Bring up broker, platform and workers; yield what runs the one measurement."""
    options = {
        **(EMBEDDED_CLIENT_OPTIONS if args.embedded else {}),
        **read_options(args.kafka_config),
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-bench-")))
        num_transactions = int(args.rate * (args.seconds + args.settle))
        world = generate_world(folder, num_transactions)
        address = args.bootstrap_servers
        if address is None:
            broker: EmbeddedBroker | RealKafka = EmbeddedBroker() if args.embedded else RealKafka()
            stack.enter_context(broker)
            address = broker.bootstrap_servers
        name = f"bench-{time.time_ns()}"
        topics, kafka = (
            make_topics(address, name, args.partitions),
            KafkaSettings(address, name, options),
        )
        settings = ServiceSettings(
            topics=topics,
            warm_from=world.history,
            state_dir=folder / "state",
            profile_dir=args.profile and args.profile.resolve(),
        )
        if args.reorder_wait_ms is not None:
            settings = replace(settings, reorder_wait_ms=args.reorder_wait_ms)
        plan = WorkerPlan(kafka, settings, load_policy(), default_schemas())
        stack.enter_context(
            running_service(
                plan, args.workers, models=args.models, device=args.device, source=source
            )
        )
        load = stack.enter_context(ExitStack())
        stream = load.enter_context(closing(open_watch_stream(kafka)))
        watch = Watch(stream, topics, from_start=False)
        offer = Offer(world.stream, args.rate)
        process = LoadProcess(address, args.kafka_config, topics, offer)
        load.callback(process.stop)

        def run() -> dict[str, float]:
            with load:
                outcome = run_trial(process, watch, offer, progress=progress_line(sys.stderr))
            return _figures(outcome, args.settle)

        yield run


def _figures(outcome: Outcome, settle_s: float) -> dict[str, float]:
    begin_ms = outcome.begin_ms + int(1000 * settle_s)
    p50, p99 = outcome.answers.quantiles_ms(after_ms=begin_ms)
    return {
        "offered_tx_s": round(outcome.sent.offered_tx_s, 1),
        "achieved_tx_s": round(outcome.tx_per_s, 1),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "drops": outcome.inputs - outcome.num_answers,
        "seconds": round(outcome.seconds - settle_s, 1),
    }


def main(args: argparse.Namespace, source: "ModelSource | None" = None) -> int:
    """Run ``trimoe bench fraud``; the last line is one JSON object."""
    figures = measure(args, source)
    broker = "embedded" if args.embedded else (args.bootstrap_servers and "given") or "apache-kafka"
    setting = {
        "broker": broker,
        "partitions": args.partitions,
        "workers": args.workers,
        "device": args.device,
        "model": str(args.models or "shipped") if source is None else "injected",
    }
    path = append_row(args.results or RESULTS, "fraud", setting | figures)
    print(f"\nevent time is compressed to the offered rate; row appended to {path.name}")
    if args.profile is not None:
        for report in sorted(args.profile.glob("stages-*.json")):
            print(f"{report.name}: {json.dumps(json.loads(report.read_text()))}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    print(json.dumps(figures))
    return 0 if figures["drops"] == 0 else 1
