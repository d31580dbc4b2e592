"""How far a batch is: a bar on a terminal, a plain line every few seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_S = 5.0  # between two lines where there is no terminal


@dataclass(frozen=True, slots=True)
class Tally:
    """Cases of a shard by what became of them.

    Args:
        num_cases: All of them.
        num_settled: Those with a result.
        num_repaired: Of these, repaired ones.
        num_quarantined: Of these, quarantined ones.
        num_held: Cases that workers have under way.
    """

    num_cases: int
    num_settled: int
    num_repaired: int
    num_quarantined: int
    num_held: int


class Pace:
    """Cases per hour of this run, and how long the rest takes at that.

    Args:
        num_settled: Cases that had a result when it began.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(self, num_settled: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = num_settled
        self._clock = clock
        self._began_s = clock()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._began_s

    def cases_per_h(self, tally: Tally) -> float:
        """Return how many cases an hour were settled in this run; 0 before the first."""
        return (tally.num_settled - self._first) * 3600.0 / max(self.seconds, 1e-9)

    def left_s(self, tally: Tally) -> float | None:
        """Return how long the rest will take; None before the first case."""
        cases_per_h = self.cases_per_h(tally)
        if not cases_per_h:
            return None
        return (tally.num_cases - tally.num_settled) * 3600.0 / cases_per_h


Show: TypeAlias = Callable[[Tally], None]


@contextmanager
def progress_on(stream: TextIO) -> Iterator[Show]:
    """Yield a function that shows a tally on a stream, to be called a few times a second."""
    if stream.isatty():
        with _bar(stream) as show:
            yield show
    else:
        yield Lines(stream).show


@contextmanager
def _bar(stream: TextIO) -> Iterator[Show]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"))
    pace: Pace | None = None
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("cases", total=None, words="starting")

        def show(tally: Tally) -> None:
            nonlocal pace
            pace = pace or Pace(tally.num_settled)
            words = _words(tally, pace)
            bar.update(task, completed=tally.num_settled, total=tally.num_cases, words=words)

        yield show


class Lines:
    """Writes the first tally, the last, and one every few seconds between.

    Args:
        stream: Takes the lines.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._pace: Pace | None = None
        self._next_s = 0.0

    def show(self, tally: Tally) -> None:
        """Take a tally, and write it if it is time."""
        self._pace = self._pace or Pace(tally.num_settled, self._clock)
        is_last = tally.num_settled == tally.num_cases
        if self._clock() >= self._next_s or is_last:
            self._next_s = self._clock() + LINE_S
            words = _words(tally, self._pace)
            self._stream.write(f"{tally.num_settled} of {tally.num_cases} cases, {words}\n")
            self._stream.flush()


def _words(tally: Tally, pace: Pace) -> str:
    left_s = pace.left_s(tally)
    return (
        f"{tally.num_held} under way, {tally.num_repaired} repaired, "
        f"{tally.num_quarantined} quarantined, {pace.cases_per_h(tally):.0f} cases/h, "
        f"{'--:--:--' if left_s is None else _clock_face(left_s)} left"
    )


def _clock_face(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
