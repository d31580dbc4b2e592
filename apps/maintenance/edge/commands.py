"""The command lines of the edge agent; what they do is imported when they run."""

import argparse
from pathlib import Path

from apps.arguments import Subparsers, later

SERVICE = "apps.maintenance.edge.service"


def add_parser(subparsers: Subparsers) -> None:
    """Add ``trimoe edge ...``."""
    edge = subparsers.add_parser(
        "edge", help="the agent of an edge box: forecasts offline, takes signed models"
    )
    commands = edge.add_subparsers(dest="edge_command", required=True, metavar="COMMAND")
    _add_init(commands)
    run = commands.add_parser("run", help="forecast and sync until SIGINT or SIGTERM")
    _add_state(run)
    run.add_argument(
        "--csv", type=Path, required=True, metavar="FILE", help="grows by machine,time,features.."
    )
    run.set_defaults(run=later(SERVICE, "run"))
    status = commands.add_parser("status", help="slot, version, queue and events of a box")
    _add_state(status)
    status.add_argument("--json", type=Path, metavar="FILE")
    status.set_defaults(run=later(SERVICE, "status"))


def _add_init(commands: Subparsers) -> None:
    parser = commands.add_parser("init", help="set up a box: name, group, root of trust")
    _add_state(parser)
    parser.add_argument("--agent", required=True, metavar="NAME", help="of this box in the fleet")
    parser.add_argument("--group", required=True, metavar="NAME", help="of its fleet group")
    parser.add_argument(
        "--root", type=Path, required=True, metavar="FILE", help="metadata/1.root.json"
    )
    parser.add_argument(
        "--cloud", default="", metavar="URL", help="of trimoe sync serve; without it, sticks only"
    )
    parser.add_argument("--pin", type=int, default=0, metavar="V", help="take only this version")
    parser.add_argument("--sync-s", type=float, default=60.0, metavar="S", help="between two talks")
    parser.add_argument("--cap-mb", type=int, default=64, metavar="MB", help="for what waits")
    parser.add_argument("--health-port", type=int, default=8099, metavar="PORT")
    parser.set_defaults(run=later(SERVICE, "init"))


def _add_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="of this box")
