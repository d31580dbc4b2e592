"""What ``trimoe demo --all`` shows: of what the model's steps are made, and how far all is.

On a terminal a few lines are rewritten; elsewhere one plain line comes every few seconds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TextIO

LINE_S = 5.0  # between two lines where there is no terminal
REWRITE_S = 0.5
WIDTH = 100  # longer lines would wrap, and could not be rewritten


@dataclass(frozen=True, slots=True)
class Steps:
    """What the steps of a stretch of time were made of.

    Args:
        seconds: How long it was.
        num_steps: Steps in it.
        num_mixed: Steps that held several tasks.
        tokens: By task and service class.
    """

    seconds: float
    num_steps: int
    num_mixed: int
    tokens: Mapping[tuple[str, str], int]

    @classmethod
    def between(cls, one: Mapping[str, Any], other: Mapping[str, Any], seconds: float) -> Self:
        """Return what came between two reports of a replica (``Engine.status``)."""
        before, after = one["step_tokens"], other["step_tokens"]
        tokens = {
            (task, each): num - before.get(task, {}).get(each, 0)
            for task, by_class in after.items()
            for each, num in by_class.items()
        }
        return cls(
            seconds,
            other["steps"] - one["steps"],
            other["mixed_steps"] - one["mixed_steps"],
            {key: num for key, num in tokens.items() if num},
        )

    @property
    def mixed_share(self) -> float:
        """Share of the steps that held several tasks."""
        return self.num_mixed / max(self.num_steps, 1)

    def by_task(self) -> Mapping[str, int]:
        """Return the tokens of each task."""
        found: dict[str, int] = {}
        for (task, _), num in self.tokens.items():
            found[task] = found.get(task, 0) + num
        return found

    def as_line(self) -> str:
        """Return it in words: steps a second, and tokens of each task and class in them."""
        parts = [
            f"{task} {each} {num} ({num / max(sum(self.tokens.values()), 1):.0%})"
            for (task, each), num in self.tokens.items()
        ]
        pace = self.num_steps / max(self.seconds, 1e-9)
        return f"steps {pace:.0f}/s, {self.mixed_share:.0%} mixed; tokens " + ", ".join(parts)


class Screen:
    """Shows the same few lines again and again.

    Args:
        out: A terminal, or anything that takes text.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._is_terminal = out.isatty()
        self._next_s = -1.0
        self._num_shown = 0

    @property
    def is_due(self) -> bool:
        """Whether it is time to show something new."""
        return self._clock() >= self._next_s

    def show(self, lines: Sequence[str]) -> None:
        """Write the lines over the ones before them, or behind each other where that cannot be."""
        self._next_s = self._clock() + (REWRITE_S if self._is_terminal else LINE_S)
        if self._is_terminal:
            up = f"\x1b[{self._num_shown}A" if self._num_shown else ""
            self._out.write(up + "".join(f"\r\x1b[K{line[:WIDTH]}\n" for line in lines))
            self._num_shown = len(lines)
        else:
            self._out.write("  |  ".join(lines) + "\n")
        self._out.flush()

    def leave(self) -> None:
        """Let what is shown stand; the next lines come below."""
        self._num_shown = 0
