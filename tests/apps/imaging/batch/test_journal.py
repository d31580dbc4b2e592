"""The journal's file: torn ends, damage, locks and what several openers see."""

import fcntl
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.imaging.batch.claims import Claims, Event, FencedError, Kind
from apps.imaging.batch.journal import Heading, Journal, decode_lines, encode_line, read_heading
from cluster.errors import ConfigurationError, UnavailableError

CASES = ("a", "b", "c")
HEADING = Heading("somewhere", "digest", {"task": "small"}, CASES)
RESULT = {"summary": {"status": "correct", "source": "\u00e9\n"}, "files": {}, "attempts": 1}


def step(claims: Claims, number: int) -> Event:
    """An event that may follow, one of several by the number."""
    case_id = CASES[number % 3]
    state = claims[case_id]
    if state.result is not None:
        return Event(Kind.CLAIM, case_id, 0)  # none
    if not state.holder:
        return Event(Kind.CLAIM, case_id, claims.last_fence + 1, worker=f"d-{number}")
    if number % 7 == 0:
        return Event(Kind.RESULT, case_id, state.fence, result=RESULT)
    return Event(Kind.FAILED, case_id, state.fence)


def write_events(path: Path, numbers: Sequence[int]) -> list[Event]:
    """Write a journal and return its events."""
    written = []
    with Journal(path) as journal, journal.locked():
        journal.begin(HEADING)
        for number in numbers:
            event = step(journal.claims, number)
            if event.fence:
                journal.append(event)
                written.append(event)
    return written


def replayed(events: Sequence[Event]) -> Claims:
    claims = Claims(CASES)
    for event in events:
        claims.apply(event)
    return claims


def states(claims: Claims) -> list[object]:
    return [*(claims[case_id] for case_id in CASES), claims.last_fence, dict(claims.held)]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 20), max_size=12),
    st.floats(0, 1),
    st.binary(max_size=400),
)
def test_any_prefix_recovers_to_the_events_that_are_whole(
    numbers: list[int], share: float, garbage: bytes
) -> None:
    """Cut anywhere, with or without what a dying disk wrote behind; then it goes on."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        written = write_events(path, numbers)
        data = path.read_bytes()
        cut = round(share * len(data))
        path.write_bytes(data[:cut] + garbage)
        num_whole = data[:cut].count(b"\n")
        with Journal(path) as journal:
            with journal.locked():
                if num_whole == 0:
                    assert journal.heading is None
                    journal.begin(HEADING)
                expected = replayed(written[: max(0, num_whole - 1)])
                assert journal.heading == HEADING
                assert states(journal.claims) == states(expected)
                event = step(journal.claims, 1)
                if event.fence:
                    journal.append(event)
            seen_here = states(journal.claims)
        records, length = decode_lines(path.read_bytes())
        assert length == path.stat().st_size
        assert len(records) == max(1, num_whole) + bool(event.fence)
        with Journal(path) as again:
            again.refresh()
            assert states(again.claims) == seen_here


@pytest.mark.parametrize("offset", [0, 9, 30])
def test_a_bad_line_before_good_ones_is_damage_and_nothing_is_cut_off(
    offset: int, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    write_events(path, [1, 2, 1])
    data = bytearray(path.read_bytes())
    data[data.index(b"\n") + 1 + offset] ^= 1
    path.write_bytes(data)
    with (
        Journal(path) as journal,
        pytest.raises(ConfigurationError, match="damage"),
        journal.locked(),
    ):
        pass
    assert path.read_bytes() == data


def test_whole_lines_that_cannot_follow_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write_events(path, [1])
    twice = Event(Kind.CLAIM, "b", 2, worker="d-1")
    path.write_bytes(path.read_bytes() + encode_line(twice.as_record()))
    with Journal(path) as journal, pytest.raises(ConfigurationError, match="damage"):
        journal.refresh()


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(encode_line({"format": "other/2"}))
    with Journal(path) as journal, pytest.raises(ConfigurationError, match="expected format"):
        journal.refresh()


def test_openers_see_each_others_events_and_cannot_both_claim(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write_events(path, [])
    with Journal(path) as first, Journal(path) as second:
        with first.locked():
            first.append(Event(Kind.CLAIM, "a", 1, worker="d-0"))
        with second.locked():
            assert second.claims["a"].holder == "d-0"
            with pytest.raises(FencedError):
                second.append(Event(Kind.CLAIM, "a", 2, worker="d-1"))
            second.append(Event(Kind.CLAIM, "b", 2, worker="d-1"))
        assert first.claims["b"].holder == ""
        first.refresh()
        assert first.claims["b"].holder == "d-1"


def test_a_refused_event_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write_events(path, [])
    before = path.read_bytes()
    with Journal(path) as journal, journal.locked():
        with pytest.raises(FencedError):
            journal.append(Event(Kind.RESULT, "a", 1, result=RESULT))
        with pytest.raises(ValueError, match="Out of range"):
            journal.append(Event(Kind.CLAIM, "a", 1, worker="d-0", at_s=float("nan")))
    assert path.read_bytes() == before


def test_nothing_is_written_without_the_lock(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal") as journal:
        with pytest.raises(RuntimeError, match="locked"):
            journal.begin(HEADING)
        with journal.locked():
            journal.begin(HEADING)
            with pytest.raises(ValueError, match="heading"):
                journal.begin(HEADING)


def test_a_lock_that_is_held_for_too_long_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with path.open("w") as other, Journal(path, patience_s=0.05) as journal:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="suspended"), journal.locked():
            pass


def test_the_heading_can_be_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert read_heading(path) is None
    write_events(path, [1, 2])
    assert read_heading(path) == HEADING
    path.write_bytes(b"")
    assert read_heading(path) is None
