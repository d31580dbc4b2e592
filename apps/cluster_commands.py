"""The commands of a cluster: ``trimoe cluster validate`` and ``trimoe cluster deploy``."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.validation.finding import Finding

DASHBOARD = "http://127.0.0.1:8265"

Subparsers = Any  # argparse keeps the type of add_subparsers() private


def add_parser(subparsers: Subparsers) -> None:
    """Register ``trimoe cluster ...``."""
    group = subparsers.add_parser("cluster", help="deploy files, and a config onto a cluster")
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")

    validate = actions.add_parser("validate", help="strict offline validation of every deploy file")
    validate.add_argument(
        "--dir", type=Path, metavar="DIR", help="deploy folder; the shipped one by default"
    )
    validate.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    validate.set_defaults(run=run_validate)

    deploy = actions.add_parser("deploy", help="a Serve config onto a running cluster")
    deploy.add_argument("--config", type=Path, required=True, metavar="FILE", help="Serve config")
    deploy.add_argument(
        "--address",
        default=os.environ.get("RAY_DASHBOARD_ADDRESS", DASHBOARD),
        metavar="URL",
        help=f"Ray dashboard; RAY_DASHBOARD_ADDRESS, or {DASHBOARD}, by default",
    )
    deploy.add_argument(
        "--wait-s",
        type=float,
        default=300.0,
        metavar="S",
        help="until the application runs; 0 does not wait",
    )
    deploy.set_defaults(run=run_deploy)


def run_validate(args: argparse.Namespace) -> int:
    """Print every finding; 1 if there is any."""
    from cluster.validation.inventory import shipped, validate  # noqa: PLC0415 - brings Ray

    folder = args.dir or shipped()
    num_files, findings = validate(folder)
    _report(findings)
    _say(f"{num_files} files in {folder}: {_count(findings)}")
    if args.json is not None:
        report = {
            "files": num_files,
            "findings": [
                {"file": f.file, "path": f.path, "expected": f.expected, "got": f.got}
                for f in findings
            ],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 1 if findings else 0


def run_deploy(args: argparse.Namespace) -> int:
    """Validate the config, hand it to the cluster and wait; 1 if it does not come to run."""
    from cluster import submission  # noqa: PLC0415 - brings Ray
    from cluster.validation.deploy_file import DeployFile, read  # noqa: PLC0415
    from cluster.validation.serve import check_serve  # noqa: PLC0415

    file = read(args.config, args.config.name)
    findings = list(check_serve(file)) if isinstance(file, DeployFile) else [file]
    if findings or not isinstance(file, DeployFile):
        _report(findings)
        _say(f"{args.config}: {_count(findings)}; nothing was deployed")
        return 1
    client = submission.connect(args.address)
    submission.submit(client, file.document)
    names = frozenset(app.get("name", "default") for app in file.document["applications"])
    _say(f"{args.address} has taken {args.config}: {', '.join(sorted(names))}")
    if args.wait_s <= 0:
        return 0
    return 0 if submission.await_running(client, names, args.wait_s, _say) else 1


def _report(findings: "Sequence[Finding]") -> None:
    for finding in findings:
        _say(str(finding))


def _count(findings: "Sequence[Finding]") -> str:
    return "1 finding" if len(findings) == 1 else f"{len(findings) or 'no'} findings"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
