"""``trimoe bench SUBJECT``: measurements; what they run is imported when they run."""

import argparse
from pathlib import Path

from apps.arguments import Subparsers, add_lessons, add_training, count, later, positive

KERNEL_OPS = ("norm", "routing", "trees", "attention", "block_sparse", "moe", "moe_fp8", "step")
SERVING_CASES = (
    "mixed",
    "goodput",
    "lengths",
    "long",
    "overload",
    "versions",
    "joint",
    "sweep",
)


def add_parser(subparsers: Subparsers) -> None:
    """Add ``trimoe bench ...``."""
    bench = subparsers.add_parser("bench", help="measurements; rows in benchmarks/results")
    subjects = bench.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    _add_fraud(subjects)
    _add_serving(subjects)
    _add_imaging(subjects)
    _add_edge(subjects)
    _add_model(subjects)
    _add_kernels(subjects)


def _add_common(parser: argparse.ArgumentParser, module: str) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=later(module))


def _add_fraud(subjects: Subparsers) -> None:
    parser = subjects.add_parser("fraud", help="open-loop load through Kafka and the platform")
    broker = parser.add_mutually_exclusive_group()
    broker.add_argument("--embedded", action="store_true", help="the demo's broker, in memory")
    broker.add_argument(
        "--bootstrap-servers", metavar="HOST:PORT[,...]", help="default: starts Apache Kafka"
    )
    parser.add_argument("--kafka-config", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rate", type=float, default=1525.0, metavar="TX_S")
    parser.add_argument("--partitions", type=int, default=4, metavar="N", help="of each topic")
    parser.add_argument("--reorder-wait-ms", type=int, help="default: that of fraud run")
    parser.add_argument("--seconds", type=float, default=60.0, help="measured part")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds that are not measured")
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    parser.add_argument("--models", metavar="DIR_OR_URL", help="default: the shipped weights")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="where the time goes, by stage")
    _add_common(parser, "benchmarks.fraud")


def _add_serving(subjects: Subparsers) -> None:
    parser = subjects.add_parser("serving", help="scheduler, engine and versions beside peers")
    parser.add_argument(
        "--case", action="append", choices=SERVING_CASES, help="default: all on CPU"
    )
    parser.add_argument("--preset", default="base", choices=("tiny", "base", "large"))
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="of case joint; default: models/shared"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=2, help="of alternating policies")
    _add_common(parser, "benchmarks.serving")


def _add_imaging(subjects: Subparsers) -> None:
    parser = subjects.add_parser("imaging", help="time per CT case beside dense networks; a batch")
    parser.add_argument(
        "--cases", type=count, default=50, metavar="N", help="of the batch; 0: no batch"
    )
    parser.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="of one case, each"
    )
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="with imaging/; default: the shipped weights"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="of OpenKBP, for the batch; default: phantoms"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="generated studies are reused")
    _add_common(parser, "benchmarks.imaging")


def _add_edge(subjects: Subparsers) -> None:
    parser = subjects.add_parser(
        "edge", help="an edge model beside its cloud model and LightGBM; a box on one core"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="of the Azure sample; default: a generated fleet"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="cloud model; default: the shipped weights"
    )
    parser.add_argument("--preset", default="small", metavar="NAME", help="to train with --data")
    parser.add_argument(
        "--windows", type=positive, default=3000, metavar="N", help="moments a box is given"
    )
    parser.add_argument(
        "--install", action="store_true", help="measure a fresh environment, and run the box in it"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="trained models are reused")
    _add_common(parser, "benchmarks.edge")


def _add_model(subjects: Subparsers) -> None:
    parser = subjects.add_parser("model", help="one core for all beside one each; balance")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shared-vs-separate", action="store_true", help="trainings of every kind, and balance"
    )
    what.add_argument(
        "--layer", action="store_true", help="one layer with experts, against the roofline"
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="trainings at once")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="SVG of which experts work for whom"
    )
    add_lessons(parser)
    add_training(parser)
    _add_common(parser, "benchmarks.model")


def _add_kernels(subjects: Subparsers) -> None:
    parser = subjects.add_parser("kernels", help="each op beside its peers, against the roofline")
    parser.add_argument("--op", action="append", choices=KERNEL_OPS, help="default: all")
    parser.add_argument(
        "--seconds", type=float, default=420.0, help="after which no further case begins"
    )
    _add_common(parser, "benchmarks.kernels")
