"""Online features equal offline features, bit for bit, through a real Kafka.

    python -m benchmarks.fraud_parity --data $TRIMOE_DATA/fraud/handbook_raw.parquet --days 60

Streams the first days of a file with their labels, from empty state and warm-started
in the middle, with 1 and with 3 workers, and compares the digest in every decision
with the digest of the offline features.
"""

import argparse
import itertools
import json
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from apps.fraud.decision import load_policy
from apps.fraud.features import DAY_MS
from apps.fraud.launch import WorkerPlan, default_schemas
from apps.fraud.settings import ServiceSettings
from apps.fraud.table import write_table
from apps.fraud.transaction import TransactionSchema
from apps.fraud.transport import KafkaSettings, KafkaStream
from benchmarks.fraud_rig import (
    Collector,
    make_topics,
    offline_digests,
    running_workers,
    send_table,
)
from benchmarks.real_kafka import RealKafka


@dataclass(frozen=True, slots=True)
class Case:
    """One run: how many workers, and whether the first half only warms the state."""

    num_workers: int
    is_warm: bool


def check(
    bootstrap_servers: str,
    table: pd.DataFrame,
    expected: dict[int | str, str],
    case: Case,
    *,
    with_model: bool,
) -> dict[str, object]:
    """Stream one case and return its counts; ``equal`` = ``transactions`` is the goal."""
    half = len(table) // 2 if case.is_warm else 0
    streamed = table[half:]
    prefix = f"parity-{case.num_workers}-{'warm' if case.is_warm else 'empty'}-{time.time_ns()}"
    topics = make_topics(bootstrap_servers, prefix)
    kafka = KafkaSettings(bootstrap_servers, prefix)
    send_table(kafka, streamed, streamed, topics)
    begin_s = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-parity-")))
        warm_from = None
        if case.is_warm:
            warm_from = folder / "history.parquet"
            write_table(table[:half], warm_from, TransactionSchema())
        settings = ServiceSettings(
            topics=topics, warm_from=warm_from, state_dir=folder, max_request_size=1024
        )
        plan = WorkerPlan(kafka, settings, load_policy(), default_schemas())
        stack.enter_context(running_workers(plan, case.num_workers, with_model=with_model))
        collector = Collector(stack.enter_context(closing(KafkaStream(kafka))), topics)
        found = collector.read_until(len(streamed))
    wanted = {key: expected[key] for key in streamed["transaction_id"].tolist()}
    return {
        "workers": case.num_workers,
        "start": "warm" if case.is_warm else "empty",
        "transactions": len(streamed),
        "decisions": found.decisions,
        "dead_letters": found.dead_letters,
        "equal": found.num_equal(wanted),
        "seconds": round(time.perf_counter() - begin_s, 1),
    }


def main() -> int:
    """Print one JSON line per case; exit 0 only if all digests are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--days", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--client", choices=("deployment", "steady"), default="deployment")
    args = parser.parse_args()
    table = TransactionSchema().read_table(args.data)
    first_ms = table["time_ms"].iloc[0] // DAY_MS * DAY_MS
    table = table[table["time_ms"] < first_ms + args.days * DAY_MS]
    expected = offline_digests(table)
    is_equal = True
    with RealKafka() as kafka:
        for num_workers, is_warm in itertools.product(args.workers, (False, True)):
            counts = check(
                kafka.bootstrap_servers,
                table,
                expected,
                Case(num_workers, is_warm),
                with_model=args.client == "deployment",
            )
            is_equal &= counts["equal"] == counts["transactions"]
            print(json.dumps(counts), flush=True)
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
