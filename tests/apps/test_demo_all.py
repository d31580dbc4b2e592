"""The parts of ``trimoe demo --all`` that need no platform."""

import hashlib
import io
import json
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from apps.demo_all import Size, beside, find_model
from apps.demo_processes import Process, as_lines, list_processes
from apps.demo_result import Company, Result, summary
from apps.demo_view import LINE_S, Screen, Steps
from apps.fraud.load import Sent
from apps.fraud.trial import Outcome
from apps.fraud.watch import Answers
from apps.imaging.batch.driver import Outcome as BatchOutcome
from apps.imaging.batch.progress import Tally
from cluster.errors import ConfigurationError

BEFORE = {"steps": 10, "mixed_steps": 1, "step_tokens": {"fraud": {"stream": 100}}}
AFTER = {
    "steps": 14,
    "mixed_steps": 4,
    "step_tokens": {"fraud": {"stream": 160, "batch": 5}, "organs": {"batch": 35}},
}


def stretch(begin_ms: int, latencies_ms: list[int], missing: int = 0) -> Outcome:
    """An outcome whose transactions came one a millisecond, two of them before the clock began."""
    sent_ms = [begin_ms - 2 + i for i in range(len(latencies_ms))]
    answers = Answers(Counter(approve=len(latencies_ms)), latency_ms=latencies_ms)
    answers.timestamp_ms = sent_ms
    sent = Sent(len(latencies_ms) - 2, 0, 0, 1.0, 100.0, 0.0)
    return Outcome(sent, answers, len(latencies_ms) + missing, begin_ms, 0.5)


def result() -> Result:
    tally = Tally(num_cases=3, num_settled=3, num_repaired=0, num_quarantined=0, num_held=0)
    company = Company(BatchOutcome(True, tally, 0, 9.0, {}), 1102.0, [5.0, 7.0, 6.0], 3)
    steps = Steps.between(BEFORE, AFTER, 2.0)
    processes = [Process(1, "replica", 900.0, True, True), Process(2, "worker", 90.0, False, False)]
    alone = stretch(1000, [900, 900, 10, 10, 10])
    together = stretch(1100, [900, 900, 30, 30, 800])  # the last one came after the batch
    return Result(alone, together, company, steps, processes, 30.0)


def test_the_others_last_as_long_as_the_rest_of_the_stream() -> None:
    size = Size.beside(15_000, 500.0)
    assert size.alone == 5_000
    assert size.cases * 4.0 == pytest.approx(20.0)
    assert size.hours * 0.4 == pytest.approx(20.0)


def test_steps_are_what_came_between_two_reports() -> None:
    steps = Steps.between(BEFORE, AFTER, 2.0)
    assert (steps.num_steps, steps.mixed_share) == (4, 0.75)
    assert steps.by_task() == {"fraud": 65, "organs": 35}
    line = steps.as_line()
    assert line.startswith("steps 2/s, 75% mixed")
    assert "fraud stream 60 (60%)" in line
    assert "organs batch 35 (35%)" in line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_written_over_and_a_file_gets_a_line_now_and_then() -> None:
    now = [0.0]
    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        screen = Screen(out, lambda: now[0])
        screen.show(["one", "two"])
        due = [screen.is_due]
        now[0] += LINE_S
        assert [*due, screen.is_due] == [False, True]
        screen.show(["three", "four"])
    assert "\x1b[2A" in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 4
    assert file.getvalue() == "one  |  two\nthree  |  four\n"


def test_figures_compare_the_stream_alone_with_the_stream_beside_the_batch() -> None:
    found = result()
    figures = found.figures()
    assert found.is_complete
    assert (figures["inputs"], figures["decisions"]) == (10, 10)
    assert (figures["p99_alone_ms"], figures["p99_beside_ms"]) == (10.0, 30.0)
    assert figures["p99_ratio"] == pytest.approx(3.0)
    assert figures["tokens"] == {"fraud": 65, "organs": 35}
    assert figures["processes_with_model"] == 1
    text = "\n".join(summary(figures, found))
    assert "10 ms alone, 30 ms beside the others: 3.00 times" in text
    assert "3 of 3 done, 0 quarantined" in text
    assert "INCOMPLETE" not in text


def test_one_missing_answer_of_any_kind_is_incomplete() -> None:
    whole = result()
    company = whole.company
    quarantined = replace(company.batch.tally, num_quarantined=1)
    for broken in (
        replace(whole, beside=stretch(1100, [1, 2, 3], missing=1)),
        replace(whole, company=company._replace(forecast_ms=[1.0])),
        replace(whole, company=company._replace(batch=replace(company.batch, is_done=False))),
        replace(whole, company=company._replace(batch=replace(company.batch, tally=quarantined))),
    ):
        assert not broken.is_complete
        assert "INCOMPLETE" in "\n".join(summary(broken.figures(), broken))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_processes_are_this_one_and_its_children_with_their_memory() -> None:
    found = {each.pid: each for each in list_processes([os.getpid()])}
    own = found[os.getpid()]
    assert own.has_model
    assert own.resident_mb > 10.0
    assert os.getppid() not in found
    table = "\n".join(as_lines(found.values()))
    assert f"{os.getpid():8d}" in table


def test_jobs_beside_are_told_to_stop_when_the_stream_fails() -> None:
    stopped = threading.Event()

    def job(stopping: threading.Event) -> None:
        assert stopping.wait(5.0)
        stopped.set()

    with pytest.raises(RuntimeError, match="stream"), beside(job):
        raise RuntimeError("stream")
    assert stopped.is_set()


def test_a_model_that_lacks_a_task_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    manifest = {
        "version": "shared-1",
        "tasks": ["fraud", "organs"],
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigurationError, match="shared-1 without forecast") as found:
        find_model(str(tmp_path))
    assert "\n" not in str(found.value)
