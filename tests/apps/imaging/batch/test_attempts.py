"""Attempts of several workers on one directory, some of them dead or thought to be."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from apps.imaging.batch.attempts import Attempt, Attempts, driver_of, seal, sweep
from apps.imaging.batch.claims import Event, FencedError, Kind, RetryLimits
from apps.imaging.batch.journal import Heading, Journal, decode_lines
from apps.imaging.batch.layout import Layout
from apps.imaging.batch.lease import LeaseWatch
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import Source, SourceKind
from apps.imaging.reasons import Reason, Status

SOURCES = {name: Source(name, f"in/{name}", f"1.{name}", SourceKind.NIFTI, ()) for name in "abc"}
WORKERS = ("d0-0-a", "d0-1-b", "d1-0-c")
LIMITS = RetryLimits(max_attempts=2, max_unavailable=3)


class Bench:
    """A directory, its journal, and workers whose leases are held or let go by hand."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.layout.make()
        self.leases: dict[str, int] = {}
        self.journals = [Journal(self.layout.journal) for _ in WORKERS]
        with self.journals[0].locked():
            self.journals[0].begin(Heading("in", "digest", {}, tuple(SOURCES)))
        watch = LeaseWatch(self.layout.leases, 60.0)
        self.attempts = []
        for worker, journal in zip(WORKERS, self.journals, strict=True):
            journal.refresh()
            self.attempts.append(Attempts(self.layout, journal, watch, worker, SOURCES, LIMITS))
        for name in (*WORKERS, "d0", "d1"):
            self.hold(name)

    def hold(self, name: str) -> None:
        if name not in self.leases:
            self.leases[name] = os.open(self.layout.leases / name, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self.leases[name], fcntl.LOCK_EX)

    def let_go(self, name: str) -> None:
        if name in self.leases:
            os.close(self.leases.pop(name))

    def close(self) -> None:
        for name in list(self.leases):
            self.let_go(name)
        for journal in self.journals:
            journal.close()

    def events(self) -> list[Event]:
        records, length = decode_lines(self.layout.journal.read_bytes())
        assert length == self.layout.journal.stat().st_size
        return [Event.from_record(record) for record in records[1:]]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def write(attempt: Attempt) -> CaseSummary:
    """Write what names the attempt and return the summary."""
    (attempt.directory / "sub").mkdir()
    (attempt.directory / "sub" / "fence.txt").write_text(str(attempt.fence))
    source = SOURCES[attempt.case_id]
    return CaseSummary(
        source.case_id,
        source.label,
        source.series_uid,
        Status.CORRECT,
        outputs={"fence": "sub/fence.txt"},
    )


def commit(attempts: Attempts, attempt: Attempt) -> None:
    attempts.commit(attempt, write(attempt), seal(attempt.directory))


def claimed(attempts: Attempts) -> Attempt:
    attempt = attempts.claim(alone=True)
    assert attempt is not None
    return attempt


class Interleavings(RuleBasedStateMachine):
    """Workers claim, commit, fail, die and are presumed dead in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.bench = Bench(Path(self.folder.name))
        self.open: list[tuple[int, Attempt]] = []
        self.kept: dict[str, int] = {}

    def teardown(self) -> None:
        self.bench.close()
        self.folder.cleanup()

    @rule(worker=st.integers(0, 2))
    def claim(self, worker: int) -> None:
        attempt = self.bench.attempts[worker].claim(alone=True)
        if attempt is not None:
            self.open.append((worker, attempt))

    @rule(choose=st.integers(0, 9))
    def commit(self, choose: int) -> None:
        if self.open:
            worker, attempt = self.open.pop(choose % len(self.open))
            try:
                commit(self.bench.attempts[worker], attempt)
            except FencedError:
                self.bench.attempts[worker].end(attempt, Kind.RELEASED)
            else:
                assert attempt.case_id not in self.kept
                self.kept[attempt.case_id] = attempt.fence

    @rule(
        choose=st.integers(0, 9),
        kind=st.sampled_from([Kind.FAILED, Kind.UNAVAILABLE, Kind.RELEASED]),
    )
    def end(self, choose: int, kind: Kind) -> None:
        if self.open:
            worker, attempt = self.open.pop(choose % len(self.open))
            self.bench.attempts[worker].end(attempt, kind, Reason("X", "why"))

    @rule(name=st.sampled_from([*WORKERS, "d0", "d1"]), is_alive=st.booleans())
    def presume(self, name: str, is_alive: bool) -> None:
        (self.bench.hold if is_alive else self.bench.let_go)(name)

    @invariant()
    def outputs_are_those_of_the_one_result(self) -> None:
        events = self.bench.events()
        results = [event for event in events if event.kind is Kind.RESULT]
        assert len({event.case_id for event in results}) == len(results)
        fences = [event.fence for event in events if event.kind is Kind.CLAIM]
        assert fences == list(range(1, len(fences) + 1))
        present = {path.name for path in self.bench.layout.cases.iterdir()}
        assert present == self.kept.keys()
        for event in results:
            assert event.result is not None
            if event.case_id in self.kept:
                path = self.bench.layout.case(event.case_id) / "sub" / "fence.txt"
                assert int(path.read_text()) == self.kept[event.case_id] == event.fence
                facts = event.result["files"][f"cases/{event.case_id}/sub/fence.txt"]
                assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                assert event.result["summary"]["status"] == "quarantined"


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def test_a_worker_presumed_dead_keeps_nothing_of_what_it_finishes_later(bench: Bench) -> None:
    slow = claimed(bench.attempts[0])
    bench.let_go(WORKERS[0])
    taken = [claimed(bench.attempts[1]) for _ in SOURCES]
    again = next(each for each in taken if each.case_id == slow.case_id)
    assert again.fence > slow.fence
    assert again.is_alone
    commit(bench.attempts[1], again)
    with pytest.raises(FencedError):
        commit(bench.attempts[0], slow)
    kept = bench.layout.case(slow.case_id) / "sub" / "fence.txt"
    assert kept.read_text() == str(again.fence)


@pytest.mark.parametrize(
    ("dead", "kind"), [((WORKERS[0],), Kind.LOST), ((WORKERS[0], "d0"), Kind.ORPHANED)]
)
def test_a_dead_worker_counts_against_its_case_unless_its_driver_died_too(
    dead: tuple[str, ...], kind: Kind, bench: Bench
) -> None:
    attempt = claimed(bench.attempts[0])
    for name in dead:
        bench.let_go(name)
    claimed(bench.attempts[2])
    ended = [event for event in bench.events() if event.fence == attempt.fence]
    assert [event.kind for event in ended] == [Kind.CLAIM, kind]


def test_a_case_that_is_tried_too_often_is_quarantined_with_the_last_reason(bench: Bench) -> None:
    for case_id in ("a", "b", "c", "a"):
        attempt = claimed(bench.attempts[0])
        assert attempt.case_id == case_id
        reason = Reason("PROCESS_FAILED", f"fence {attempt.fence}")
        bench.attempts[0].end(attempt, Kind.FAILED, reason)
    claimed(bench.attempts[1])
    result = bench.events()[-2].result
    assert result is not None
    assert result["attempts"] == 2
    summary = CaseSummary.from_json(result["summary"])
    assert (summary.case_id, summary.source, summary.series_uid) == ("a", "in/a", "1.a")
    assert summary.status is Status.QUARANTINED
    expected = Reason("PROCESS_FAILED", "given up after 2 attempts; the last: fence 4")
    assert summary.reasons == (expected,)


def test_outputs_without_a_result_make_room(bench: Bench) -> None:
    """What a worker leaves that is killed between the rename and the line in the journal."""
    left = bench.layout.case("a")
    left.mkdir()
    (left / "old.txt").touch()
    attempt = claimed(bench.attempts[0])
    assert attempt.case_id == "a"
    commit(bench.attempts[0], attempt)
    assert [path.name for path in left.rglob("*.txt")] == ["fence.txt"]
    assert list(bench.layout.attempts.iterdir()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda attempt, summary: summary.outputs.update(other="missing.txt"),
        lambda attempt, summary: summary.seconds.update(read=float("nan")),
        lambda attempt, summary: (attempt.directory / "link").symlink_to("sub"),
    ],
    ids=["names what is not there", "not of JSON", "a link"],
)
def test_an_attempt_that_cannot_be_kept_whole_is_not_kept(
    spoil: Callable[[Attempt, CaseSummary], object], bench: Bench
) -> None:
    attempt = claimed(bench.attempts[0])
    summary = write(attempt)
    spoil(attempt, summary)
    with pytest.raises(ValueError, match=r"expected|Out of range"):
        bench.attempts[0].commit(attempt, summary, seal(attempt.directory))
    assert list(bench.layout.cases.iterdir()) == []
    assert [event.kind for event in bench.events()] == [Kind.CLAIM]


def test_the_summary_of_another_case_is_refused(bench: Bench) -> None:
    attempt = claimed(bench.attempts[0])
    other = CaseSummary("b", "in/b", "1.b", Status.CORRECT)
    with pytest.raises(ValueError, match="expected its summary"):
        bench.attempts[0].commit(attempt, other, {})


def test_a_sweep_removes_what_is_over_and_nothing_that_runs(bench: Bench) -> None:
    over, runs = claimed(bench.attempts[0]), claimed(bench.attempts[1])
    with bench.journals[0].locked():
        bench.journals[0].append(Event(Kind.LOST, over.case_id, over.fence))
    later = claimed(bench.attempts[2])  # not in what the first journal has read
    sweep(bench.layout, bench.journals[0])
    assert set(bench.layout.attempts.iterdir()) == {runs.directory, later.directory}


def test_a_worker_is_named_after_its_driver() -> None:
    assert driver_of("3fa9-0-77b1") == "3fa9"
    with pytest.raises(ValueError, match="expected"):
        driver_of("nobody")
