"""``trimoe keys create`` as a user meets it."""

import json
from pathlib import Path

import pytest

from apps.cli import main
from cluster.caller import Rate, Role
from cluster.keys import load_keys


def test_a_key_is_printed_once_alone_and_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.json"
    arguments = ["keys", "create", "--tenant", "risk", "--file", str(path)]
    assert main([*arguments, "--task", "fraud", "--requests-per-s", "5"]) == 0
    printed = capsys.readouterr()
    (token,) = printed.out.splitlines()
    assert "shown only now" in printed.err
    assert token not in path.read_text()
    caller = load_keys(path).find(token.encode())
    assert caller is not None
    assert (caller.tenant, caller.rate) == ("risk", Rate(requests_per_s=5.0))
    assert caller.tasks == frozenset({"fraud"})
    assert main([*arguments, "--role", "metrics", "--task", "fraud"]) == 0
    second = load_keys(path).find(capsys.readouterr().out.strip().encode())
    assert second is not None
    assert second.roles == frozenset({Role.METRICS})
    assert second.rate == caller.rate


@pytest.mark.parametrize(
    "extra", [["--requests-per-s", "0"], ["--rows-per-s", "nan"], ["--rows-per-s", "inf"]]
)
def test_a_rate_that_is_none_is_one_line_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    path = tmp_path / "keys.json"
    assert main(["keys", "create", "--tenant", "risk", "--file", str(path), *extra]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected" in line
    assert not path.exists()


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "package.json"
    path.write_text(json.dumps({"name": "x"}))
    assert main(["keys", "create", "--tenant", "risk", "--file", str(path)]) == 2
    assert json.loads(path.read_text()) == {"name": "x"}
