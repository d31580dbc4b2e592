"""The command lines of the forecasts; what they do is imported when they run."""

import argparse
from datetime import UTC, datetime
from pathlib import Path

from apps.arguments import Subparsers, later, positive


def add_parser(subparsers: Subparsers) -> None:
    """Add ``trimoe maintenance ...``."""
    maintenance = subparsers.add_parser(
        "maintenance", help="failure forecasts of machines, from telemetry and event logs"
    )
    commands = maintenance.add_subparsers(
        dest="maintenance_command", required=True, metavar="COMMAND"
    )
    _add_evaluate(commands)
    _add_simulate(commands)
    _add_train(commands)
    _add_distill(commands)
    _add_forecast(commands)
    _add_ledger(commands)


def _add_evaluate(commands: Subparsers) -> None:
    parser = commands.add_parser("evaluate", help="the public protocols, beside LightGBM")
    parser.add_argument("--dataset", choices=("azure", "cmapss"), required=True)
    parser.add_argument(
        "--subset", default="FD001", metavar="NAME", help="of cmapss: train_NAME.parquet and so on"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder of the dataset's files"
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N")
    parser.add_argument("--preset", default="small", metavar="NAME", help="sizes of the core")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="finished parts are kept here and reused"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=later("apps.maintenance.training.evaluate"))


def _add_simulate(commands: Subparsers) -> None:
    parser = commands.add_parser("simulate", help="generate a fleet as a folder of tables")
    parser.add_argument("--machines", type=positive, default=60, metavar="N")
    parser.add_argument("--days", type=positive, default=360, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.set_defaults(run=later("apps.maintenance.simulate"))


def _add_train(commands: Subparsers) -> None:
    parser = commands.add_parser("train", help="weights and calibration of the forecasts")
    _add_fleet(parser)
    parser.add_argument("--preset", default="small", metavar="NAME", help="sizes of the core")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="finished parts are kept here and reused"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=later("apps.maintenance.training.train"))


def _add_fleet(parser: argparse.ArgumentParser) -> None:
    """Add what is learned from, and where to."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="tables, as simulate writes them")
    source.add_argument("--simulate", action="store_true", help="a generated fleet")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def _add_distill(commands: Subparsers) -> None:
    parser = commands.add_parser("distill", help="an edge model from trained weights")
    _add_fleet(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("models/shared"),
        metavar="DIR",
        help="as train writes it",
    )
    parser.set_defaults(run=later("apps.maintenance.training.distill"))


def _add_forecast(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "forecast", help="hazards, hours left and alerts by the shared deployment"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "data", type=Path, nargs="?", metavar="DIR", help="tables, or a history that --mqtt fills"
    )
    source.add_argument(
        "--mqtt", metavar="URL", help="mqtt://[USER@]HOST[:PORT]/PREFIX: live, until stopped"
    )
    parser.add_argument("--plant", type=Path, metavar="FILE", help="plant.json; of --mqtt")
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="history, alerts, queues; of --mqtt"
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="HTTP API of a running `trimoe serve`"
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/shared"),
        metavar="DIR",
        help="folder of the weights that it serves, with forecast.json",
    )
    parser.add_argument(
        "--at", type=_moment, metavar="TIME", help="of the forecast, UTC; default: last of the data"
    )
    parser.add_argument(
        "--since", type=_moment, metavar="TIME", help="forecast every third hour from here on"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="forecasts.parquet and alerts.jsonl are kept here"
    )
    parser.add_argument("--webhook", metavar="URL", help="of --mqtt: alerts go there, signed")
    parser.add_argument(
        "--dashboard", default="", metavar="URL", help="of --mqtt: a running trimoe sync serve"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=later("apps.maintenance.forecasts.service"))


def _add_ledger(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "ledger", help="planned against unplanned hours of downtime, replayed"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="as of forecast")
    parser.add_argument(
        "--forecasts",
        type=Path,
        required=True,
        metavar="DIR",
        help="what forecast --out has kept, or a finished part of evaluate --work",
    )
    parser.add_argument(
        "--fleet", type=Path, metavar="DIR", help="of the platform; its dashboard shows the ledger"
    )
    for name, hours, what in (
        ("wait", 24.0, "until technician and part are there, unwarned"),
        ("repair", 8.0, "of a failed component"),
        ("planned", 3.0, "to replace a component that still runs"),
        ("inspection", 1.0, "that a false episode costs"),
    ):
        parser.add_argument(
            f"--{name}-hours", type=float, default=hours, metavar="H", help=f"{what}; {hours:g}"
        )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=later("apps.maintenance.replay"))


def _moment(text: str) -> datetime:
    """Return a whole hour, UTC without a zone."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is not None:
        found = found.astimezone(UTC).replace(tzinfo=None)
    if (found.minute, found.second, found.microsecond) != (0, 0, 0):
        message = f"expected a whole hour, got {text}"
        raise argparse.ArgumentTypeError(message)
    return found
