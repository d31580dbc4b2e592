"""The command lines of the imaging application; what they do is imported when they run."""

import argparse
from pathlib import Path

from apps.arguments import Subparsers, count, later, positive


def add_parser(subparsers: Subparsers) -> None:
    """Add ``trimoe imaging ...``."""
    imaging = subparsers.add_parser(
        "imaging", help="batch CT imaging: a folder of studies in, reports and segmentations out"
    )
    commands = imaging.add_subparsers(dest="imaging_command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_verify(commands)
    _add_train(commands)
    _add_evaluate(commands)


def _add_run(commands: Subparsers) -> None:
    parser = commands.add_parser("run", help="process every case below a path, once")
    parser.add_argument("input", type=Path, metavar="INPUT", help="folder, archive or file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the batch in DIR where it ended"
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="every N-th case from I; runs of other shards share DIR",
    )
    parser.add_argument(
        "--in-flight", type=positive, default=2, metavar="N", help="cases a worker holds at once"
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="signs; made on first use")
    _add_workers(parser)
    parser.set_defaults(run=later("apps.imaging.service", "run"))


def _add_verify(commands: Subparsers) -> None:
    parser = commands.add_parser("verify", help="check signature and files, run a sample again")
    parser.add_argument("directory", type=Path, metavar="DIR", help="output of a run")
    parser.add_argument("--sample", type=count, default=3, metavar="N", help="cases to run again")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="chooses them")
    parser.add_argument("--input", type=Path, metavar="INPUT", help="default: as it was run with")
    parser.add_argument(
        "--public-key", type=Path, metavar="FILE", help="who must have signed; default: DIR's own"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="empty, for the sample; default: a temporary one"
    )
    _add_workers(parser)
    parser.set_defaults(run=later("apps.imaging.service", "verify"))


def _add_train(commands: Subparsers) -> None:
    parser = commands.add_parser("train", help="weights and calibration of the organ task")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="folder of pt_*.npz, as OpenKBP's")
    source.add_argument("--phantoms", type=positive, metavar="N", help="generated anatomy")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_training(parser)
    parser.set_defaults(run=later("apps.imaging.training.fit"))


def _add_evaluate(commands: Subparsers) -> None:
    parser = commands.add_parser("evaluate", help="the public protocols, beside baselines")
    parser.add_argument("--task", choices=("adrenal", "organs"), required=True)
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="adrenalmnist3d*.npz, or OpenKBP's folder with train and validation",
    )
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="of adrenal")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keeps weights and figures of finished parts"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    _add_training(parser)
    parser.set_defaults(run=later("apps.imaging.training.evaluate"))


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", default="small", metavar="NAME", help="sizes of the shared core"
    )
    parser.add_argument("--seconds", type=float, default=1800.0, help="of training, each")
    parser.add_argument(
        "--loaders",
        type=count,
        default=0,
        metavar="N",
        help="processes that cut windows, or that train the seeds of adrenal",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, default=2, metavar="N")
    parser.add_argument(
        "--address",
        metavar="auto|HOST:PORT|ray://..",
        help="a running Ray cluster with the platform; default: RAY_ADDRESS, else a local one",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
