"""What ``trimoe sync publish``, ``rollout``, ``serve``, ``status``, ``export`` and ``import`` do."""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from apps.maintenance.sync.control import Control
from apps.maintenance.sync.keys import load_keys, load_private_key, make_key, make_keys
from apps.maintenance.sync.offers import EVERY_GROUP
from apps.maintenance.sync.operators import Action, Decision, write_operator
from apps.maintenance.sync.policy import Plan, Status
from apps.maintenance.sync.publishing import Permit, find_offer, permit_downgrade, publish_bundle
from apps.maintenance.sync.repository import Repository
from apps.maintenance.sync.rollout import Rollout
from apps.maintenance.sync.shadow import History
from apps.maintenance.sync.sticks import export_stick
from cluster.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

NUM_KEYS: Mapping[str, int] = {"root": 3, "targets": 3, "snapshot": 1, "timestamp": 1}
THRESHOLDS: Mapping[str, int] = {"root": 2, "targets": 2, "snapshot": 1, "timestamp": 1}


def publish(args: argparse.Namespace) -> int:
    """Sign a bundle, or make, refresh or change what signs."""
    folder: Path = args.fleet / "repository"
    if args.init:
        signers = {role: make_keys(args.keys[0], {role: num}) for role, num in NUM_KEYS.items()}
        Repository.create(folder, signers, THRESHOLDS)
        return _say({"repository": str(folder), "keys": str(args.keys[0])})
    repository = Repository(folder, load_keys(args.keys))
    if args.bundle:
        offer = publish_bundle(repository, args.bundle.read_bytes(), args.group or [EVERY_GROUP])
        routes = {route.path: route.num_bytes for route in offer.routes}
        return _say({"bundle": offer.path, "version": offer.version, "bytes": routes})
    if args.rotate:
        keys = args.keys[0]
        first = 1 + len(list(keys.glob(f"{args.rotate}-*.pem")))
        names = range(first, first + NUM_KEYS[args.rotate])
        new = [make_key(keys / f"{args.rotate}-{number}.pem") for number in names]
        repository.rotate(args.rotate, new)
    elif args.permit_downgrade:
        if not args.from_version:
            message = "--permit-downgrade: expected --from-version, the versions boxes run now"
            raise ConfigurationError(message)
        until = datetime.now(UTC) + timedelta(days=args.days)
        permit = Permit(tuple(args.from_version), until)
        permit_downgrade(repository, args.permit_downgrade, permit)
    else:
        repository.refresh()
    return _say({"timestamp": repository.timestamp.version, "root": repository.root.version})


def begin(args: argparse.Namespace) -> int:
    """Run the shadow, then begin a rollout unless it objects."""
    plan = Plan(args.shares, args.min_success, args.max_error)
    history = History.read(args.history)
    with Control(args.fleet) as control:
        repository = Repository(control.repository, [])
        offer = find_offer(repository, args.bundle)
        rollout = control.begin_rollout(repository, offer, args.group, plan, history)
    _say(asdict(rollout))
    return 1 if rollout.status is Status.STOPPED else 0


def decide(args: argparse.Namespace) -> int:
    """Sign an operator's decision and do it."""
    key = load_private_key(args.key)
    with Control(args.fleet) as control:
        rollout = control.rollouts.get(args.rollout)
        action = Action(args.rollout_command)
        control.rollouts.act(_decision(rollout, action, args.operator).sign(key))
        return _say(asdict(control.rollouts.get(args.rollout)))


def add_operator(args: argparse.Namespace) -> int:
    """Make the key of somebody who may decide."""
    make_key(args.key)
    key = load_private_key(args.key)
    write_operator(args.fleet / "operators", args.operator, key.public_key())
    return _say({"operator": args.operator, "key": str(args.key)})


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    import uvicorn  # noqa: PLC0415 - of the platform, not of publishing

    from apps.console.server import add_console  # noqa: PLC0415 - likewise
    from apps.maintenance.sync.server import create_app  # noqa: PLC0415 - likewise

    with Control(args.fleet) as control:
        Repository(control.repository, [])  # says what to do if there is none
        app = create_app(control, control.repository)
        add_console(app, control)
        uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


def status(args: argparse.Namespace) -> int:
    """Say how the fleet is."""
    with Control(args.fleet) as control:
        facts = {**control.state(), "audit_end": control.verify_audit()}
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))
    return _say(facts)


def export(args: argparse.Namespace) -> int:
    """Write a stick."""
    repository = Repository(args.fleet / "repository", [])
    files = export_stick(repository, find_offer(repository, args.bundle), args.out)
    num_bytes = sum(path.stat().st_size for path in files)
    return _say({"stick": str(args.out), "files": len(files), "bytes": num_bytes})


def _decision(rollout: Rollout, action: Action, operator: str) -> Decision:
    return Decision(rollout.id, rollout.digest, rollout.stage, action, operator, time.time())


def _say(facts: Mapping[str, object]) -> int:
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    return 0
