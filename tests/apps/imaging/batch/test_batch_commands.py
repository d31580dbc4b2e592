"""``trimoe imaging run`` and ``verify``: arguments, answers, exit statuses and signals."""

import argparse
import json
import os
import signal
import threading
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from apps.imaging.batch.process import Application
from apps.imaging.batch.verification import verify_command
from apps.imaging.batch.workers import WorkerPlan
from apps.imaging.commands import add_parser
from apps.imaging.launch import INTERRUPTED, run_command, stop_on_signal
from cluster.errors import ConfigurationError
from tests.apps.imaging.batch.small_batch import (
    APPLICATION,
    ThreadCrew,
    discover,
    hire_thread,
    make_input,
    process,
    report,
)


def parsed(*words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["imaging", *map(str, words)])


def run(folder: Path, *options: str | Path, application: Application = APPLICATION) -> int:
    args = parsed("run", folder / "in", "--out", folder / "out", "--key", folder / "k", *options)
    return run_command(args, application, hire_thread)


@pytest.mark.slow
def test_a_run_says_what_came_of_it_and_is_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_input(tmp_path / "in", [{}, {}, {"how": "unreadable"}])
    assert run(tmp_path, "--json", tmp_path / "run.json") == 0
    said = capsys.readouterr()
    assert said.out.startswith("3 cases, 2 correct, 0 repaired, 1 quarantined, 0 pending, 1 set")
    assert said.err.splitlines()[-1].startswith("3 of 3 cases")
    figures = json.loads((tmp_path / "run.json").read_text())
    assert (figures["done"], figures["settled"], figures["settled_before"]) == (True, 3, 0)
    assert figures["cases_per_h"] == pytest.approx(3 * 3600 / figures["seconds"], rel=0.01)

    args = parsed("verify", tmp_path / "out", "--sample", "2", "--json", tmp_path / "check.json")
    assert verify_command(args, APPLICATION, hire_thread) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("passed: 3 cases, 2 of them")
    assert json.loads((tmp_path / "check.json").read_text())["passed"]

    (tmp_path / "out" / "index.html").write_text("better news")
    assert verify_command(parsed("verify", tmp_path / "out"), APPLICATION, hire_thread) == 1
    assert "index.html: was altered" in capsys.readouterr().out


def test_a_second_run_refuses_in_one_line_and_resumes_when_asked(tmp_path: Path) -> None:
    make_input(tmp_path / "in", [{}, {}])
    assert run(tmp_path) == 0
    with pytest.raises(ConfigurationError, match=r"2 of 2 cases done; go on .* --resume") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)
    assert run(tmp_path, "--resume") == 0


def test_an_output_inside_the_input_is_refused(tmp_path: Path) -> None:
    make_input(tmp_path / "in", [{}])
    for out in (tmp_path / "in", tmp_path / "in" / "out"):
        args = parsed("run", tmp_path / "in", "--out", out)
        with pytest.raises(ConfigurationError, match="outside the input"):
            run_command(args, APPLICATION, hire_thread)
    assert {path.suffix for path in (tmp_path / "in").iterdir()} == {".json", ".txt"}


def test_an_input_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run(tmp_path)


def test_ctrl_c_ends_a_run_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The signal comes while workers are being hired, which Ray would take for itself."""
    make_input(tmp_path / "in", [{"seconds": 30.0}])

    def hire(plan: WorkerPlan) -> AbstractContextManager[ThreadCrew]:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as Ray does
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return hire_thread(replace(plan, settings=replace(plan.settings, drain_s=0.1)))

    args = parsed("run", tmp_path / "in", "--out", tmp_path / "out", "--key", tmp_path / "k")
    before = signal.getsignal(signal.SIGINT)
    assert run_command(args, APPLICATION, hire) == INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "stopped: 0 of 1 cases done; go on with the same command and --resume"


def test_the_second_signal_is_the_systems() -> None:
    with stop_on_signal(hire_thread) as (_, stopping):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.wait(1.0)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("option", ["--workers", "--in-flight"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_counts_that_are_none_are_refused(option: str, value: str) -> None:
    with pytest.raises(SystemExit):
        parsed("run", "in", "--out", "out", option, value)


def test_settings_that_changed_are_refused(tmp_path: Path) -> None:
    make_input(tmp_path / "in", [{}])
    assert run(tmp_path) == 0
    other = Application(discover, process, report, {"task": "other"})
    with pytest.raises(ConfigurationError, match="task differ"):
        run(tmp_path, "--resume", application=other)
