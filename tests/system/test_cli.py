"""The command line as a user meets it: help everywhere, bad input in one line."""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apps.cli import build_parser, main
from cluster.errors import ConfigurationError


def commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield every command with all its words, groups included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield (*words, name)
                yield from commands(child, (*words, name))


COMMANDS = sorted(commands(build_parser()))


def test_the_promised_commands_exist() -> None:
    promised = {"demo", "serve", "status", "check", "models list", "models show", "bench fraud"}
    promised |= {"keys create"}
    promised |= {
        f"fraud {name}"
        for name in ("run", "features", "evaluate", "simulate", "train", "backtest", "replay")
    }
    promised |= {"cluster validate", "cluster deploy"}
    assert promised <= {" ".join(words) for words in COMMANDS}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    assert f"usage: trimoe {' '.join(words)} " in capsys.readouterr().out


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_unknown_option_is_one_line(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--no-such-option"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trimoe")
    assert "error:" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["fraud", "features", "--data", "no/such.parquet", "--out", "{folder}/out.parquet"],
        ["fraud", "run", "--bootstrap-servers", "127.0.0.1:1", "--kafka-config", "no_such=1"],
        ["fraud", "backtest", "--data", "no/such.parquet", "--url", "http://127.0.0.1:1"],
        ["models", "show", "no-such-model", "--models", "{folder}"],
        ["status", "--url", "http://127.0.0.1:1"],
        ["cluster", "validate", "--dir", "{folder}/nowhere"],
        ["cluster", "deploy", "--config", "{folder}/none.yaml"],
        ["keys", "create", "--tenant", "a/b", "--file", "{folder}/keys.json"],
        ["serve", "--host", "0.0.0.0"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_bad_input_is_one_line_and_not_zero(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trimoe: error: ")


def run_in_parser(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Run ``main`` with a command that ends in ``error``."""

    def fail(_: argparse.Namespace) -> int:
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=fail)
    monkeypatch.setattr("apps.cli.build_parser", lambda: parser)
    return main([])


def test_a_missing_dependency_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    assert run_in_parser(monkeypatch, error) == 2
    expected = "trimoe: error: torch.nn is not installed; pip install 'trimoe[platform]'\n"
    assert capsys.readouterr().err == expected


def test_a_missing_module_of_ours_is_a_defect_and_shown_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModuleNotFoundError):
        run_in_parser(monkeypatch, ModuleNotFoundError("no", name="apps.fraud.nowhere"))


def test_an_expected_error_of_many_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_in_parser(monkeypatch, ConfigurationError("first\n  second")) == 2
    assert capsys.readouterr().err == "trimoe: error: first second\n"


def test_an_interrupt_has_its_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_in_parser(monkeypatch, KeyboardInterrupt()) == 130


def test_help_needs_numpy_alone() -> None:
    """With every optional package hidden, the help of all commands still prints."""
    hidden = ["torch", "ray", "kafka", "pandas", "pyarrow", "sklearn", "xgboost", "safetensors"]
    hidden += ["fastapi", "pydantic", "starlette", "yaml"]  # come with ray[serve]
    probe = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
        "from apps.cli import build_parser; print(build_parser().format_help())"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "fraud" in done.stdout
