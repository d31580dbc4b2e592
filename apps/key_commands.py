"""``trimoe keys create``: a new API key for a tenant, told once and kept as a hash."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cluster.caller import Rate, Role
from cluster.errors import ConfigurationError
from cluster.keys import create_key

Subparsers = Any  # argparse keeps the type of add_subparsers() private


def add_parser(subparsers: Subparsers) -> None:
    """Register the commands of this module."""
    keys = subparsers.add_parser("keys", help="API keys of the HTTP API")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key; it is printed once")
    create.add_argument("--tenant", required=True, help="whom the key speaks for")
    create.add_argument("--file", type=Path, required=True, help="file of keys; made if missing")
    create.add_argument(
        "--role",
        action="append",
        default=[],
        choices=[role.value for role in Role],
        help="what it may do; may be repeated (default: infer and jobs)",
    )
    create.add_argument(
        "--task", action="append", default=[], help="a task it may use; may be repeated (all)"
    )
    create.add_argument("--requests-per-s", type=float, metavar="N", help="rate of the tenant")
    create.add_argument("--rows-per-s", type=float, metavar="N", help="rate of the tenant")
    create.set_defaults(run=run_create)


def run_create(args: argparse.Namespace) -> int:
    """Append a key to the file and print it."""
    token = create_key(
        args.file,
        args.tenant,
        roles=[Role(role) for role in args.role],
        tasks=args.task,
        rate=_rate(args),
    )
    sys.stderr.write("keep it: it is stored nowhere, and shown only now\n")
    sys.stdout.write(token + "\n")
    return 0


def _rate(args: argparse.Namespace) -> Rate | None:
    usual = Rate()
    given = (args.requests_per_s, args.rows_per_s)
    if given == (None, None):
        return None
    if any(value is not None and not value > 0 for value in given):
        message = f"rates: expected numbers above 0, got {given}"
        raise ConfigurationError(message)
    return Rate(args.requests_per_s or usual.requests_per_s, args.rows_per_s or usual.rows_per_s)
