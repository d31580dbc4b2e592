"""The command lines of the fraud application; what they do is imported when they run."""

import argparse
from pathlib import Path
from typing import NamedTuple

from apps.arguments import Subparsers, later
from apps.fraud.settings import ServiceSettings, Topics

_DEFAULTS = ServiceSettings()


class _Stream(NamedTuple):
    """How much of what a demo streams, unless it is told."""

    rate: float
    transactions: int


_DEMO, _DEMO_OF_ALL = _Stream(1000.0, 24_000), _Stream(500.0, 15_000)


def add_parser(subparsers: Subparsers) -> None:
    """Add ``trimoe fraud ...`` and ``trimoe demo``."""
    fraud = subparsers.add_parser("fraud", help="streaming transaction fraud scoring from Kafka")
    commands = fraud.add_subparsers(dest="fraud_command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_features(commands)
    _add_simulate(commands)
    _add_replay(commands)
    _add_backtest(commands)
    _add_evaluate(commands)
    _add_train(commands)
    _add_demo(subparsers)


def add_kafka_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add where Kafka is and how to talk to it, and the names of the topics."""
    names = Topics()
    parser.add_argument("--bootstrap-servers", required=required, metavar="HOST:PORT[,...]")
    parser.add_argument(
        "--kafka-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any kafka-python setting, such as security_protocol=SSL; may be repeated",
    )
    parser.add_argument(
        "--kafka-config-file", type=Path, metavar="FILE", help="the same, JSON or properties"
    )
    for topic in ("transactions", "labels", "decisions", "dead_letters"):
        option = f"--{topic.replace('_', '-')}-topic"
        parser.add_argument(option, default=getattr(names, topic), metavar="TOPIC")


def topics_of(args: argparse.Namespace) -> Topics:
    """Return the topic names that were given."""
    return Topics(
        args.transactions_topic, args.labels_topic, args.decisions_topic, args.dead_letters_topic
    )


def _add_run(commands: Subparsers) -> None:
    parser = commands.add_parser("run", help="score a Kafka topic until stopped")
    add_kafka_arguments(parser)
    parser.add_argument("--group", default="trimoe-fraud", help="group of the committed offsets")
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    parser.add_argument("--warm-from", type=Path, metavar="FILE", help="earlier transactions")
    parser.add_argument("--policy", type=Path, metavar="FILE", help="thresholds and rules, JSON")
    parser.add_argument("--state", type=Path, default=Path("fraud-state"), metavar="DIR")
    parser.add_argument("--models", metavar="DIR_OR_URL", help="default: the shipped weights")
    parser.add_argument(
        "--address",
        metavar="auto|HOST:PORT|ray://..",
        help="a running Ray cluster with the platform; default: RAY_ADDRESS, else a local one",
    )
    parser.add_argument(
        "--snapshot-s", type=float, default=_DEFAULTS.snapshot_period_s, help="snapshot period"
    )
    parser.add_argument("--reorder-wait-ms", type=int, default=_DEFAULTS.reorder_wait_ms)
    parser.add_argument("--max-request-size", type=int, default=_DEFAULTS.max_request_size)
    parser.add_argument("--max-in-flight", type=int, default=_DEFAULTS.max_in_flight)
    parser.add_argument(
        "--replay", action="store_true", help="accept event times ahead of the record's timestamp"
    )
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write stage times at the end")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.set_defaults(run=later("apps.fraud.launch", "run_command"))


def _add_features(commands: Subparsers) -> None:
    parser = commands.add_parser("features", help="offline features of a file")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="parquet")
    parser.set_defaults(run=_features)


def _features(args: argparse.Namespace) -> int:
    from apps.fraud.offline import write_features  # noqa: PLC0415 - pandas only when needed

    num_rows = write_features(args.data, args.out)
    print(f"{num_rows} rows of features in {args.out}")  # noqa: T201 - a command's answer
    return 0


def _add_simulate(commands: Subparsers) -> None:
    parser = commands.add_parser("simulate", help="generate transactions with labels")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="parquet or CSV")
    parser.add_argument("--cards", type=int, default=5000)
    parser.add_argument("--terminals", type=int, default=10_000)
    parser.add_argument("--days", type=int, default=183)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    from apps.fraud.simulate import SimulationConfig, simulate  # noqa: PLC0415 - pandas
    from apps.fraud.table import write_table  # noqa: PLC0415
    from apps.fraud.transaction import TransactionSchema  # noqa: PLC0415

    config = SimulationConfig(args.cards, args.terminals, args.days, seed=args.seed)
    table = simulate(config)
    write_table(table, args.out, TransactionSchema())
    print(f"{len(table)} transactions in {args.out}")  # noqa: T201 - a command's answer
    return 0


def _add_replay(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "replay", help="send the messages of a topic, or the payloads of dead letters, again"
    )
    add_kafka_arguments(parser)
    parser.add_argument("--from-topic", required=True, metavar="TOPIC")
    parser.add_argument("--to-topic", required=True, metavar="TOPIC")
    parser.add_argument("--rate", type=float, metavar="TX_S", help="default: as fast as it goes")
    parser.add_argument(
        "--payloads", action="store_true", help="the source holds dead letters: send what failed"
    )
    parser.set_defaults(run=later("apps.fraud.replay"))


def _add_backtest(commands: Subparsers) -> None:
    parser = commands.add_parser("backtest", help="what a policy would have decided over history")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="with labels")
    parser.add_argument("--policy", type=Path, metavar="FILE", help="what if; default: shipped")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="default: shipped policy")
    parser.add_argument("--days", type=int, default=7, help="last days of the file to decide")
    parser.add_argument("--url", required=True, help="HTTP API of a running `trimoe serve`")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=later("apps.fraud.backtest"))


def _add_evaluate(commands: Subparsers) -> None:
    parser = commands.add_parser("evaluate", help="the published protocol, with baselines")
    parser.add_argument("--protocol", choices=("handbook",), default="handbook")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--work", type=Path, metavar="DIR", help="finished folds are reused")
    parser.set_defaults(run=later("apps.fraud.evaluate"))


def _add_train(commands: Subparsers) -> None:
    parser = commands.add_parser("train", help="train weights on a file or on generated data")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="FILE")
    source.add_argument("--simulate", action="store_true")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, metavar="DIR", help="finished parts are reused")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=later("apps.fraud.train"))


def _add_demo(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("demo", help="generated transactions through the whole platform")
    add_kafka_arguments(parser, required=False)
    parser.add_argument(
        "--all", action="store_true", help="a CT batch and forecasts beside them, on one model"
    )
    for name, kind, metavar in (("rate", float, "TX_S"), ("transactions", int, "N")):
        alone, together = (getattr(each, name) for each in (_DEMO, _DEMO_OF_ALL))
        parser.add_argument(
            f"--{name}", type=kind, metavar=metavar, help=f"default: {alone}, with --all {together}"
        )
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    parser.add_argument("--models", metavar="DIR_OR_URL", help="default: the shipped weights")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    """Run the demo; beside others, the stream leaves half of two cores to them."""
    for name, usual in (_DEMO_OF_ALL if args.all else _DEMO)._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    return later("apps.demo_all" if args.all else "apps.fraud.demo")(args)
