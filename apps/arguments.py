"""What command lines share: numbers with a bound, and runners imported when they run."""

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import TypeAlias

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
