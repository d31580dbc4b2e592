"""The platform's own commands: serve, status, check.

Heavy packages are imported when a command needs them, so that ``trimoe --help`` is quick
and works on a base install.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

from cluster.errors import TrimoeError
from cluster.keys import keys_path_from_environment
from cluster.registry import Registry
from cluster.report import fetch_report

PACKAGES: Final = ("apps", "cluster", "core_model", "kernels")
REQUIRED: Final = {"numpy": "the base", "ray": "[platform]", "torch": "[platform]"}
OPTIONAL: Final = ("kafka-python", "pandas", "xgboost-cpu", "safetensors", "triton", "onnxruntime")
PROBE_TIMEOUT_S = 20.0

Subparsers = Any  # argparse keeps the type of add_subparsers() private


class Finding(NamedTuple):
    """One line of ``trimoe check``."""

    passed: bool
    subject: str
    detail: str


def add_parser(subparsers: Subparsers) -> None:
    """Register the commands of this module."""
    serve = subparsers.add_parser("serve", help="run the local platform with its HTTP API")
    _add_models(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address of the HTTP API")
    serve.add_argument("--port", type=int, default=8000, help="port of the HTTP API")
    serve.add_argument("--model", help="name or version; needed if there are several")
    serve.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    serve.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        default=keys_path_from_environment(),
        help="who may ask (default: $TRIMOE_API_KEYS); without it, this machine alone",
    )
    serve.set_defaults(run=run_serve)

    status = subparsers.add_parser("status", help="what runs")
    status.add_argument("--url", default="http://127.0.0.1:8000", help="root of the HTTP API")
    status.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    status.set_defaults(run=run_status)

    check = subparsers.add_parser("check", help="self-test of this environment")
    _add_models(check)
    check.set_defaults(run=run_check)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="models", help="models directory or URL")


def run_serve(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM, then shut down."""
    from cluster import platform  # noqa: PLC0415 - brings Ray

    config = platform.PlatformConfig(
        models=args.models,
        model=args.model,
        host=args.host,
        port=args.port,
        device=args.device,
        api_keys=args.api_keys,
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    _say("starting Ray and loading the model ...")
    running = platform.start(config)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray installs its own while it starts
        signal.signal(number, lambda *_: stop.set())
    try:
        if args.api_keys is None:
            _say("no API keys: open to every process of this machine, and to no other machine")
        _say(f"ready at {running.url}; stop with Ctrl-C")
        stop.wait()
        _say("shutting down ...")
    finally:
        running.stop()
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Print what a running platform reports; an error if it does not answer or is not ready.

    With $TRIMOE_API_KEY it sees more than that it is ready, where keys are needed.
    """
    report = fetch_report(args.url, "/readyz")
    for name, value in report.items():
        if name == "models":
            for model in value:
                _say(f"{'model':14} {json.dumps(model)}")
        else:
            _say(f"{name:14} {', '.join(value) if isinstance(value, list) else value}")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print the findings; 1 if any has failed."""
    findings = list(_findings(args.models))
    for finding in findings:
        _say(f"{'ok  ' if finding.passed else 'FAIL'} {finding.subject:14} {finding.detail}")
    return 0 if all(finding.passed for finding in findings) else 1


def _findings(models: str) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(sys.version_info >= (3, 11), "python", f"{version} (3.11 or later)")
    for name, extra in REQUIRED.items():
        came = _version_of(name)
        yield Finding(came is not None, name, came or f"missing; it comes with {extra}")
    for name in OPTIONAL:
        yield Finding(True, name, _version_of(name) or "not installed (optional)")
    yield from _package_owners()
    yield from _weights(models)
    for tool in ("java", "mvn"):
        path = shutil.which(tool)
        yield Finding(True, tool, path or "not found: tests with real Apache Kafka are skipped")
    yield Finding(True, "gpu", _gpu())


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package_owners() -> Iterator[Finding]:
    """Our import names exist on PyPI under other owners; a second one breaks ours silently."""
    owners: Mapping[str, Sequence[str]] = metadata.packages_distributions()
    for package in PACKAGES:
        others = sorted(set(owners.get(package, ())) - {"trimoe"})
        detail = f"also owned by {', '.join(others)}; uninstall it" if others else "ours alone"
        yield Finding(not others, package, detail)


def _weights(models: str) -> Iterator[Finding]:
    registry = Registry(models)
    try:
        entries = registry.models()
        if not entries:
            yield Finding(False, "models", f"none in {models}")
        for entry in entries:
            registry.fetch(entry.name)
            yield Finding(True, "models", f"{entry.name} {entry.version}: weights match")
    except TrimoeError as error:
        yield Finding(False, "models", str(error))


def _gpu() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none (CPU only)"
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # noqa: S603 - fixed words, no shell
            query, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    return ", ".join(done.stdout.split("\n")).strip(", ")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
