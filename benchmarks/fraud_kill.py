"""SIGKILL of workers at random moments under load: nothing is lost, no feature differs.

    python -m benchmarks.fraud_kill --kills 10

Real Apache Kafka, supervised workers, transactions on a fixed schedule.  At the end
every input must have an answer, and every decision the digest of the offline
features; decisions given twice are allowed and counted.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from apps.fraud.decision import load_policy
from apps.fraud.launch import WorkerPlan, default_schemas
from apps.fraud.load import encode_table, send_on_schedule
from apps.fraud.settings import ServiceSettings
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.transport import KafkaSettings, KafkaStream
from benchmarks.fraud_rig import (
    NUM_PARTITIONS,
    Collector,
    make_topics,
    offline_digests,
    running_workers,
)
from benchmarks.real_kafka import RealKafka
from cluster.errors import TrimoeError

if TYPE_CHECKING:
    from cluster.workers import WorkerGroup

REORDER_WAIT_MS = 3000  # sender, broker and workers starve one another here; recovery is the test
_RESTART_S = 30.0  # a worker process is back within seconds


class Plan(NamedTuple):
    """What is done to how many workers, and how often."""

    kills: int
    num_workers: int
    rate_tx_s: float
    seed: int
    with_model: bool


def kill_run(bootstrap_servers: str, table: pd.DataFrame, plan: Plan) -> dict[str, object]:
    """Send a table on schedule, kill workers meanwhile, and return the counts."""
    topics = make_topics(bootstrap_servers, f"kill-{time.time_ns()}")
    kafka = KafkaSettings(bootstrap_servers, f"kill-{time.time_ns()}")
    messages = encode_table(table, topics, NUM_PARTITIONS)
    expected = offline_digests(table)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-kill-")))
        settings = ServiceSettings(
            topics=topics, state_dir=folder, snapshot_period_s=2.0, reorder_wait_ms=REORDER_WAIT_MS
        )
        worker_plan = WorkerPlan(kafka, settings, load_policy(), default_schemas())
        group = stack.enter_context(
            running_workers(worker_plan, plan.num_workers, with_model=plan.with_model)
        )
        collector = Collector(stack.enter_context(closing(KafkaStream(kafka))), topics)
        sender = stack.enter_context(closing(KafkaStream(kafka)))
        sending = threading.Thread(
            target=send_on_schedule, args=(sender, messages, plan.rate_tx_s), daemon=True
        )
        sending.start()
        seconds = len(table) / plan.rate_tx_s
        kills = _kill_at_random(group, collector, plan, seconds)
        sending.join()
        found = collector.read_until(len(table))
    wrong = sorted(k for k, v in found.digests.items() if v != {expected[k]})
    return {
        "transactions": len(table),
        "unequal": wrong[:5],
        "kills": kills,
        "decided": len(found.digests),
        "dead_letters": found.dead_letters,
        "repeated": found.repeated,
        "equal": found.num_equal(expected),
    }


def _kill_at_random(
    group: "WorkerGroup", collector: Collector, plan: Plan, seconds: float
) -> Sequence[float]:
    """Kill one worker at each of some random moments; return the moments in seconds."""
    chosen = random.Random(plan.seed)  # noqa: S311 - moments and victims
    moments = sorted(chosen.uniform(0.1 * seconds, 0.95 * seconds) for _ in range(plan.kills))
    begin_s, done = time.monotonic(), []
    for moment_s in moments:
        while time.monotonic() < begin_s + moment_s:
            collector.read()
        os.kill(chosen.choice(_pids(group)), signal.SIGKILL)
        done.append(round(time.monotonic() - begin_s, 2))
    return done


def _pids(group: "WorkerGroup") -> Sequence[int]:
    """Return the workers' processes; one that restarts just now is waited for."""
    deadline_s = time.monotonic() + _RESTART_S
    while True:
        try:
            return [place.pid for place in group.places()]
        except TrimoeError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


def main() -> int:
    """Print the counts as one JSON line; exit 0 only if all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--transactions", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--client", choices=("deployment", "steady"), default="deployment")
    args = parser.parse_args()
    table = simulate(SimulationConfig(num_days=30, seed=args.seed))[: args.transactions]
    plan = Plan(args.kills, args.workers, args.rate, args.seed, args.client == "deployment")
    with RealKafka() as kafka:
        counts = kill_run(kafka.bootstrap_servers, table, plan)
    print(json.dumps(counts))
    return 0 if counts["equal"] == counts["decided"] == counts["transactions"] else 1


if __name__ == "__main__":
    sys.exit(main())
