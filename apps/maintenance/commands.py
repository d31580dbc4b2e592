"""The command lines of the forecasts; what they do is imported when they run."""

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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="tables, as simulate writes them")
    source.add_argument("--simulate", action="store_true", help="a generated fleet")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--preset", default="small", metavar="NAME", help="sizes of the core")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="finished parts; default: OUT/work"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=later("apps.maintenance.training.train"))
