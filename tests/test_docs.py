"""The documents tell the truth: the tree, the commands, no host and no machine in them."""

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apps.cli import build_parser
from tests.conftest import PHASES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
CONTENT = "models/"  # its folders are described by their model cards
HOST = re.compile(
    r"[a-z]+://|\b[\w-]+(\.[\w-]+)*\.(com|org|net|io|dev|cloud|internal)\b", re.IGNORECASE
)
MACHINE = re.compile(r"(?<![\w.$}/])/(work|home|root|Users|mnt|tmp/\w)/?\w*")


def repository_files() -> list[Path]:
    """Return the files that are, or could be, committed."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def tree_in_readme() -> set[str]:
    """Return the paths of the annotated tree, folders with a slash at the end."""
    (block,) = re.findall(r"## Where things are\n+```\n(.*?)```", README, re.DOTALL)
    found: set[str] = set()
    folder = ""
    for line in block.splitlines():
        path = re.match(r"( *)(\S+) +\S", line)
        assert path, f"expected a path and a phrase, got {line!r}"
        if not path.group(1):
            folder = path.group(2)
        found.add(folder + path.group(2) if path.group(1) else folder)
    return found


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    files = [path for path in repository_files() if not path.parts[0].startswith(".")]
    folders = {"/".join(p.parts[:n]) + "/" for p in files for n in (1, 2) if len(p.parts) > n}
    folders = {name for name in folders if not name.startswith(CONTENT) or name == CONTENT}
    listed = tree_in_readme()
    assert {name for name in listed if name.endswith("/")} == folders
    assert {name for name in listed if not name.endswith("/")} <= {p.as_posix() for p in files}
    assert {p.name for p in files if len(p.parts) == 1} <= listed | {"LICENSE"}


def leaf_commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ("trimoe",)
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command that runs something."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield " ".join(words), parser
    for group in groups:
        assert {choice.dest: choice.help for choice in group._choices_actions}.keys() == set(
            group.choices
        ), f"every command of {' '.join(words)} needs a line of help"
        for name, child in group.choices.items():
            yield from leaf_commands(child, (*words, name))


@pytest.mark.parametrize("command", [name for name, _ in leaf_commands(build_parser())])
def test_every_command_has_a_line_in_the_documents(command: str) -> None:
    assert f"`{command}" in GUIDES or f"\n{command}" in GUIDES


@pytest.mark.parametrize("name", ["constraints.txt", "pom.xml"])
def test_pinned_versions_name_no_host(name: str) -> None:
    assert not HOST.search(
        (ROOT / name).read_text().replace("org.apache", "").replace("org.slf4j", "")
    )


def test_constraints_are_names_and_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.+!]+", line) for line in lines)


def test_make_test_runs_each_phase_once() -> None:
    lists = re.findall(r"--phases (\S+)", (ROOT / "Makefile").read_text())
    assert sorted(",".join(lists).split(",")) == sorted(PHASES)


def test_no_file_names_a_path_of_one_machine() -> None:
    found = [
        f"{path}: {match.group()}"
        for path in repository_files()
        if path.suffix in {".py", ".md", ".toml", ".txt", ".xml", ".json", ".yaml", ""}
        for match in [MACHINE.search((ROOT / path).read_text(errors="replace"))]
        if match and path != Path("tests/test_docs.py")
    ]
    assert not found
