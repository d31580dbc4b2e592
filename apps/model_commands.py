"""``trimoe models ...``: versions in a registry, and which of them is served.

A change of aliases is a write to the registry; every replica follows it within about a
second and swaps between two steps (docs/adr/0008).  ``promote`` asks a running platform
what the version did on trial, and refuses what the gate objects to.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from apps.arguments import PRESETS, Subparsers, add_lessons, add_training, count, later
from cluster.errors import ConfigurationError, UnknownModelError
from cluster.registry import Registry
from cluster.report import fetch_report
from cluster.versions import Aliases, Gate


def add_parser(subparsers: Subparsers) -> None:
    """Add ``trimoe models ...``."""
    models = subparsers.add_parser("models", help="model versions, and which of them is served")
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all versions")
    listing.set_defaults(run=run_list)
    show = actions.add_parser("show", help="the manifest of one version")
    show.add_argument("name", help="name or version")
    show.set_defaults(run=run_show)

    size = actions.add_parser("size", help="parameters of a preset, in total and active per token")
    size.add_argument("preset", choices=PRESETS)
    size.add_argument(
        "--vocabulary", type=count, default=0, metavar="N", help="tokens; 0: no vocabulary"
    )
    size.set_defaults(run=later("core_model.size"))

    _add_train(actions)
    _add_level(actions)
    trial = actions.add_parser("trial", help="try a version beside the stable one")
    trial.add_argument("name", help="name or version")
    kind = trial.add_mutually_exclusive_group(required=True)
    kind.add_argument("--canary", type=float, metavar="SHARE", help="answer that share")
    kind.add_argument("--shadow", type=float, metavar="SHARE", help="compute it, answer nothing")
    trial.set_defaults(run=run_trial)

    promote = actions.add_parser("promote", help="make a version stable if its trial went well")
    promote.add_argument("name", help="name or version")
    promote.add_argument("--url", default="http://127.0.0.1:8000", help="root of the HTTP API")
    for each in fields(Gate):
        option = f"--{each.name.replace('_', '-')}"
        promote.add_argument(option, type=type(each.default), default=each.default, metavar="N")
    promote.set_defaults(run=run_promote)

    rollback = actions.add_parser(
        "rollback", help="end the trial; without one, serve the version before"
    )
    rollback.set_defaults(run=run_rollback)
    for parser in (listing, show, trial, promote, rollback):
        parser.add_argument("--models", default="models", help="models directory or URL")


def _add_train(actions: Subparsers) -> None:
    train = actions.add_parser("train", help="one checkpoint of all applications, trained together")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the checkpoint")
    add_lessons(train)
    add_training(train)
    train.add_argument(
        "--balance-loss",
        type=float,
        default=0.0,
        metavar="W",
        help="weight of an auxiliary loss; 0 balances the experts by their bias",
    )
    _add_run(train)
    train.set_defaults(run=later("apps.joint"))


def _add_level(actions: Subparsers) -> None:
    level = actions.add_parser(
        "level",
        help="load the experts of a checkpoint evenly on the traffic there is, without training",
    )
    level.add_argument("checkpoint", type=Path, metavar="DIR", help="of the checkpoint")
    level.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the levelled one")
    level.add_argument("--version", help="of the levelled one; default: as it was")
    add_lessons(level)
    _add_run(level)
    level.set_defaults(run=later("apps.level"))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=count, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")


def run_list(args: argparse.Namespace) -> int:
    """Print one line per version: name, version, tasks, and its aliases if it has any."""
    registry = Registry(args.models)
    entries = registry.models()
    try:
        aliases = registry.aliases() if entries else None
    except ConfigurationError:  # several versions, and nobody has said which is served
        aliases = None
    for entry in entries:
        names = [] if aliases is None else aliases.names_of(entry.version)
        line = f"{entry.name:20} {entry.version:24} {', '.join(entry.tasks):20} {', '.join(names)}"
        _say(line.rstrip())
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print a manifest, after its weights were found to match it."""
    entry = Registry(args.models).fetch(args.name)
    _say(json.dumps(entry.manifest, indent=2, sort_keys=True))
    return 0


def run_trial(args: argparse.Namespace) -> int:
    """Put a version on trial, in place of the one that is."""
    registry = Registry(args.models)
    version = registry.find(args.name).version
    now = registry.aliases()
    if version == now.stable:
        message = f"models trial: expected a version other than the stable one, got {version}"
        raise ConfigurationError(message)
    alone = Aliases(stable=now.stable, previous=now.previous)
    if args.canary is not None:
        _apply(registry, replace(alone, canary=version, canary_share=args.canary))
    else:
        _apply(registry, replace(alone, shadow=version, shadow_share=args.shadow))
    return 0


def run_promote(args: argparse.Namespace) -> int:
    """Make a version stable; 1 with the reasons if the gate objects."""
    registry = Registry(args.models)
    version = registry.find(args.name).version
    now = registry.aliases()
    if version == now.stable:
        _say(f"{version} is stable already")
        return 0
    reports = {
        each["model_version"]: each for each in fetch_report(args.url, "/v1/models")["models"]
    }
    gate = Gate(**{each.name: getattr(args, each.name) for each in fields(Gate)})
    trial = _report_of(version, reports, args.url)
    objections = gate.objections(trial, _report_of(now.stable, reports, args.url))
    for objection in objections:
        _say(f"{version} stays on trial: {objection}")
    if objections:
        return 1
    _apply(registry, now.promoted(version))
    return 0


def run_rollback(args: argparse.Namespace) -> int:
    """End a trial; if there is none, return to the version that was stable before."""
    registry = Registry(args.models)
    now = registry.aliases()
    if now.canary is None and now.shadow is None:
        _apply(registry, now.rolled_back())
    else:
        _apply(registry, Aliases(stable=now.stable, previous=now.previous))
    return 0


def _report_of(
    version: str, reports: Mapping[str, Mapping[str, Any]], url: str
) -> Mapping[str, Any]:
    if version not in reports:
        message = (
            f"{url}: expected {version} among the versions it has loaded, got {sorted(reports)}; "
            f"start with trimoe models trial {version}"
        )
        raise UnknownModelError(message)
    return reports[version]


def _apply(registry: Registry, aliases: Aliases) -> None:
    registry.set_aliases(aliases)
    parts: Sequence[str] = [f"stable {aliases.stable}"]
    if aliases.canary is not None:
        parts = [*parts, f"canary {aliases.canary} ({aliases.canary_share:.1%})"]
    if aliases.shadow is not None:
        parts = [*parts, f"shadow {aliases.shadow} ({aliases.shadow_share:.1%})"]
    if aliases.previous is not None:
        parts = [*parts, f"previous {aliases.previous}"]
    _say(", ".join(parts))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
