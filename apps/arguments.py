"""What command lines share: numbers with a bound, runners imported when they run, ``--json``."""

import argparse
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

PRESETS = ("tiny", "small", "base", "large", "deepseek-v3")  # of the shared core
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def later(module: str, function: str = "main") -> Callable[[argparse.Namespace], int]:
    """Return a runner that imports its module when it is called."""

    def run(args: argparse.Namespace) -> int:
        runner: Callable[[argparse.Namespace], int] = getattr(import_module(module), function)
        return runner(args)

    return run


def count(text: str) -> int:
    """Return a whole number from 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """Return a whole number from 1."""
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        message = f"expected {least} or more, got {number}"
        raise argparse.ArgumentTypeError(message)
    return number


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures where ``--json`` said, if it did."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def add_lessons(parser: argparse.ArgumentParser) -> None:
    """Add what joint training learns from."""
    parser.add_argument("--organs", type=Path, metavar="DIR", help="volumes pt_*.npz of OpenKBP")
    parser.add_argument(
        "--organs-test", type=Path, metavar="DIR", help="to measure on; default: a tenth held out"
    )
    parser.add_argument(
        "--phantoms", type=positive, default=40, metavar="N", help="in the place of --organs"
    )
    parser.add_argument(
        "--adrenal", type=Path, metavar="FILE", help="of AdrenalMNIST3D; without it no such task"
    )
    parser.add_argument(
        "--loaders", type=count, default=0, metavar="N", help="processes that cut CT windows"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="finished parts are reused")


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add what is trained, and how long."""
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--steps", type=positive, default=2000, metavar="N")
