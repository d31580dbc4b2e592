"""Work that pauses between two pieces of it."""

from collections.abc import Generator
from typing import TypeAlias, TypeVar, cast

T = TypeVar("T")
Paused: TypeAlias = Generator[None, None, T]


def finish(work: Paused[T]) -> T:
    """Run work through all of its pauses and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast("T", end.value)
