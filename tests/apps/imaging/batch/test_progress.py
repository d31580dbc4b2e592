"""What a user sees of a batch, on a terminal and elsewhere."""

import io

import pytest

from apps.imaging.batch.progress import LINE_S, Lines, Pace, Tally, progress_on


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    """A stream that somebody looks at."""

    def isatty(self) -> bool:
        return True


def test_the_pace_counts_what_this_run_did() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    assert pace.left_s(Tally(40, 10, 0, 0, 2)) is None
    clock.now_s += 60.0
    tally = Tally(40, 20, 0, 0, 2)
    assert pace.cases_per_h(tally) == pytest.approx(600.0)
    assert pace.left_s(tally) == pytest.approx(120.0)


def test_without_a_terminal_there_is_a_line_every_few_seconds_and_a_last_one() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, clock)
    for second in range(61):
        lines.show(Tally(62, second, 3, 1, 2))
        clock.now_s += 1.0
    lines.show(Tally(62, 62, 3, 1, 0))
    said = stream.getvalue().splitlines()
    assert len(said) == 60 / LINE_S + 1 + 1
    assert said[0].startswith("0 of 62 cases, 2 under way, 3 repaired, 1 quarantined, ")
    assert said[0].endswith("0 cases/h, --:--:-- left")
    assert said[-2].endswith("3600 cases/h, 0:00:02 left")
    assert said[-1].startswith("62 of 62 cases")


def test_a_long_rest_is_told_in_hours() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, clock)
    lines.show(Tally(3662, 0, 0, 0, 2))
    clock.now_s += LINE_S
    lines.show(Tally(3662, 1, 0, 0, 2))
    assert stream.getvalue().endswith("720 cases/h, 5:05:05 left\n")


def test_on_a_terminal_there_is_a_bar() -> None:
    stream = Terminal()
    with progress_on(stream) as show:
        show(Tally(4, 1, 0, 0, 2))
        show(Tally(4, 3, 0, 1, 1))
    assert "3/4" in stream.getvalue()
    assert "1 quarantined" in stream.getvalue()
