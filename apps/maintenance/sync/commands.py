"""The command lines of the sync; what they do is imported when they run."""

import argparse
from pathlib import Path

from apps.arguments import Subparsers, later, positive

SERVICE = "apps.maintenance.sync.service"
ROLES = ("root", "targets", "snapshot", "timestamp")


def add_parser(subparsers: Subparsers) -> None:
    """Add ``trimoe sync ...``."""
    sync = subparsers.add_parser(
        "sync", help="signed models for edge boxes: publishing, staged rollout, sticks"
    )
    commands = sync.add_subparsers(dest="sync_command", required=True, metavar="COMMAND")
    _add_publish(commands)
    _add_rollout(commands)
    _add_retrain(commands)
    serve = commands.add_parser("serve", help="repository, reports and uploads over HTTP")
    _add_fleet(serve)
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8090)
    serve.set_defaults(run=later(SERVICE, "serve"))
    status = commands.add_parser("status", help="boxes, rollouts, and whether the audit log holds")
    _add_fleet(status)
    status.add_argument("--json", type=Path, metavar="FILE")
    status.set_defaults(run=later(SERVICE, "status"))
    export = commands.add_parser("export", help="write a bundle to a stick")
    _add_fleet(export)
    export.add_argument("bundle", metavar="BUNDLE", help="published name, such as task-both/7.tar")
    export.add_argument("--out", type=Path, required=True, metavar="DIR")
    export.set_defaults(run=later(SERVICE, "export"))
    take = commands.add_parser("import", help="bring a stick to a box; its agent verifies it")
    take.add_argument("stick", type=Path, metavar="DIR")
    take.add_argument("--state", type=Path, required=True, metavar="DIR", help="of the box")
    take.set_defaults(run=later("apps.maintenance.edge.service", "import_stick"))


def _add_publish(commands: Subparsers) -> None:
    parser = commands.add_parser("publish", help="sign a bundle, or what else the keys are for")
    _add_fleet(parser)
    parser.add_argument(
        "--keys",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="of role keys; may be given again",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--init", action="store_true", help="make the repository and its keys")
    what.add_argument("--bundle", type=Path, metavar="FILE", help="sign a packed bundle")
    what.add_argument("--refresh", action="store_true", help="sign the timestamp anew")
    what.add_argument("--rotate", choices=ROLES, help="replace the keys of a role")
    what.add_argument("--permit-downgrade", metavar="BUNDLE", help="let boxes go back to it")
    parser.add_argument(
        "--group", action="append", metavar="NAME", help="of --bundle; default: every group"
    )
    parser.add_argument(
        "--from-version", type=int, action="append", metavar="V", help="of --permit-downgrade"
    )
    parser.add_argument("--days", type=float, default=14.0, help="of --permit-downgrade")
    parser.set_defaults(run=later(SERVICE, "publish"))


def _add_rollout(commands: Subparsers) -> None:
    rollout = commands.add_parser("rollout", help="begin a staged rollout, or decide over one")
    verbs = rollout.add_subparsers(dest="rollout_command", required=True, metavar="VERB")
    begin = verbs.add_parser("begin", help="shadow on recorded windows, then stage by stage")
    _add_fleet(begin)
    begin.add_argument("bundle", metavar="BUNDLE", help="published name, such as task-both/7.tar")
    begin.add_argument("--group", required=True, metavar="NAME")
    begin.add_argument(
        "--history", type=Path, required=True, metavar="NPZ", help="recorded windows and failures"
    )
    begin.add_argument(
        "--shares",
        type=_shares,
        default=(0.05, 0.25, 1.0),
        metavar="S[,S...]",
        help="of the group, by stage; default: .05,.25,1",
    )
    begin.add_argument("--min-success", type=float, default=0.95, metavar="SHARE")
    begin.add_argument("--max-error", type=float, default=0.02, metavar="SHARE")
    begin.set_defaults(run=later(SERVICE, "begin"))
    for verb in ("approve", "pause", "resume", "stop"):
        parser = verbs.add_parser(verb, help=f"{verb} a rollout, signed by an operator")
        _add_fleet(parser)
        parser.add_argument("rollout", type=int, metavar="N")
        parser.add_argument("--operator", required=True, metavar="NAME")
        parser.add_argument("--key", type=Path, required=True, metavar="FILE")
        parser.set_defaults(run=later(SERVICE, "decide"))
    operator = verbs.add_parser("operator", help="make a key for who may decide")
    _add_fleet(operator)
    operator.add_argument("operator", metavar="NAME")
    operator.add_argument("--key", type=Path, required=True, metavar="FILE", help="to be made")
    operator.set_defaults(run=later(SERVICE, "add_operator"))


def _add_retrain(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "retrain", help="look at the triggers of a group; train, sign and roll out if one asks"
    )
    _add_fleet(parser)
    parser.add_argument("--group", required=True, metavar="NAME")
    parser.add_argument(
        "--record", type=Path, required=True, metavar="DIR", help="tables of the plant, up to now"
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="of the first deployed model"
    )
    parser.add_argument(
        "--keys",
        type=Path,
        action="append",
        metavar="DIR",
        help="of role keys; may be given again; default: the bundle waits for a signature",
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of a job")
    parser.add_argument(
        "--every", type=float, default=0.0, metavar="S", help="look again; default: once"
    )
    parser.set_defaults(run=later("apps.maintenance.training.retrain"))


def _add_fleet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fleet", type=Path, required=True, metavar="DIR", help="of the platform")


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
