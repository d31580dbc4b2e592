"""The live view of ``trimoe demo --all``: the stream, the cases, the forecasts, and the steps."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.demo_processes import Process, list_processes
from apps.demo_view import Screen, Steps
from apps.fraud.watch import Answers
from apps.imaging.batch.progress import Tally


@dataclass
class Board:
    """Gathers what is known while the demo runs, and shows it.

    Args:
        screen: Where.
        look: Returns what the replica reports now (``Engine.status``).
        answers: Of the stream, so far.
        tally: Of the CT cases.
        num_forecasts: That came back.
        wanted_forecasts: That will be asked for.
        processes: Of the run, while all of it is up.
    """

    screen: Screen
    look: Callable[[], Mapping[str, Any]]
    answers: Answers | None = None
    tally: Tally | None = None
    num_forecasts: int = 0
    wanted_forecasts: int = 0

    processes: Sequence[Process] = ()
    _seen: tuple[float, Mapping[str, Any]] | None = None
    _shown: tuple[float, int] = (0.0, 0)

    def take_answers(self, answers: Answers) -> None:
        """Take the state of the stream; show everything if it is time."""
        self.answers = answers
        self.refresh()

    def take_tally(self, tally: Tally) -> None:
        """Take the state of the batch."""
        self.tally = tally

    def take_forecasts(self, num: int) -> None:
        """Take the number of forecasts that came back."""
        self.num_forecasts = num

    def refresh(self) -> None:
        """Show everything if it is time."""
        if self.tally is not None and self.tally.num_held and not self.processes:
            self.processes = list_processes([self.look()["pid"]])
        if not self.screen.is_due:
            return
        now_s, report = time.perf_counter(), self.look()
        lines = [self._stream_line(now_s)]
        if self.tally is not None:
            tally = self.tally
            lines.append(
                f"CT {tally.num_settled} of {tally.num_cases} cases, {tally.num_held} under way, "
                f"{tally.num_quarantined} quarantined"
            )
        if self.wanted_forecasts:
            lines.append(f"forecasts {self.num_forecasts} of {self.wanted_forecasts}")
        if self._seen is not None:
            seen_s, before = self._seen
            lines.append(Steps.between(before, report, now_s - seen_s).as_line())
        self._seen = now_s, report
        self.screen.show(lines)

    def _stream_line(self, now_s: float) -> str:
        if self.answers is None:
            return "fraud -"
        count = self.answers.num_decisions + self.answers.num_dead_letters
        last_s, last = self._shown
        rate = max(count - last, 0) / (now_s - last_s)
        self._shown = now_s, count
        p50, p99 = self.answers.quantiles_ms(last=int(rate) + 1)
        return f"fraud {count} answered, {rate:.0f} tx/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
