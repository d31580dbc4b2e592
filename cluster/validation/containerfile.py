"""The Containerfile: pinned bases, no root, nothing fetched by address, no secrets.

Reads instructions as builders do (continuations, comments), not the shell inside RUN.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from cluster.validation.deploy_file import DeployFile
from cluster.validation.finding import Finding, among
from cluster.validation.image import EXPECTED_PIN, is_pinned
from cluster.validation.ray_start import check_environment
from cluster.validation.secrecy import FLAG, KEY_BLOCK, is_secret_name

INSTRUCTIONS: Final = frozenset(
    [
        "ADD",
        "ARG",
        "CMD",
        "COPY",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "FROM",
        "HEALTHCHECK",
        "LABEL",
        "RUN",
        "SHELL",
        "STOPSIGNAL",
        "USER",
        "VOLUME",
        "WORKDIR",
    ]
)
NEEDED: Final = ("HEALTHCHECK", "USER")  # in the last stage
PIPED_SHELL: Final = re.compile(r"\b(curl|wget)\b[^|;&]*\|\s*(ba)?sh\b")


class Instruction(NamedTuple):
    """One instruction."""

    line: int
    name: str
    value: str

    @property
    def place(self) -> str:
        """Where it is, for a finding."""
        return f"line {self.line}: {self.name}"


def parse(text: str) -> Sequence[Instruction]:
    """Return the instructions, continuations joined and comments left out."""
    found, pending, start = [], "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not pending and not line.strip()):
            continue
        start = start if pending else number
        pending += line.rstrip().removesuffix("\\") + " "
        if not line.rstrip().endswith("\\"):
            name, _, value = pending.strip().partition(" ")
            found.append(Instruction(start, name, value.strip()))
            pending = ""
    return found


def check_containerfile(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in a Containerfile."""
    instructions = parse(file.text)
    stages: list[str] = []
    for each in instructions:
        if each.name not in INSTRUCTIONS:
            yield Finding(file.name, each.place, among(each.name, INSTRUCTIONS), repr(each.name))
        elif each.name == "FROM":
            yield from _check_base(file.name, each, stages)
        else:
            yield from _check_instruction(file.name, each, stages)
    last = list(_last_stage(instructions))
    for name in NEEDED:
        if not any(each.name == name for each in last):
            yield Finding(file.name, "", f"{name} in the last stage", "none")
    yield from check_environment(file.name, environment(last), "ENV")


def _check_base(file: str, each: Instruction, stages: list[str]) -> Iterator[Finding]:
    words = [word for word in each.value.split() if not word.startswith("--")]
    if words and words[0] not in stages and not is_pinned(words[0]):
        yield Finding(file, each.place, EXPECTED_PIN, words[0])
    if len(words) == 3 and words[1].upper() == "AS":
        stages.append(words[2])
    elif len(words) != 1:
        yield Finding(file, each.place, "an image, or an image AS a name", each.value)


def _check_instruction(file: str, each: Instruction, stages: Sequence[str]) -> Iterator[Finding]:
    if each.name == "ADD":
        yield Finding(file, each.place, "COPY, which fetches nothing", each.value)
    if each.name == "USER" and each.value.partition(":")[0] in {"root", "0"}:
        yield Finding(file, each.place, "a user other than root", each.value)
    if each.name == "COPY":
        source = re.match(r"--from=(\S+)", each.value)
        if source and source[1] not in stages and not is_pinned(source[1]):
            yield Finding(file, each.place, f"a stage ({', '.join(stages)})", source[1])
    if each.name == "RUN":
        yield from _check_run(file, each)
    if each.name in {"CMD", "ENTRYPOINT", "HEALTHCHECK"}:
        yield from _check_exec_form(file, each)
    yield from _check_secrecy(file, each)


def _check_secrecy(file: str, each: Instruction) -> Iterator[Finding]:
    names = _assigned(each.value) if each.name in {"ENV", "ARG"} else ()
    for name in filter(is_secret_name, names):
        yield Finding(file, each.place, "no secret: it stays in the image", name)
    if FLAG.search(each.value) or KEY_BLOCK.search(each.value):
        yield Finding(file, each.place, "no secret: it stays in the image", "one in the text")


def _check_run(file: str, each: Instruction) -> Iterator[Finding]:
    if PIPED_SHELL.search(each.value):
        yield Finding(file, each.place, "packages by name", "a script piped into a shell")
    if re.search(r"\bpip3? install\b", each.value) and not re.search(
        r"(-c|--constraint)[ =]constraints\.txt", each.value
    ):
        yield Finding(file, each.place, "pip install -c constraints.txt", each.value)
    if "apt-get install" in each.value and "--no-install-recommends" not in each.value:
        yield Finding(file, each.place, "apt-get install --no-install-recommends", each.value)


def _check_exec_form(file: str, each: Instruction) -> Iterator[Finding]:
    """A JSON list that is none is run as a shell command, brackets and all."""
    command = each.value.partition("CMD")[2] if each.name == "HEALTHCHECK" else each.value
    try:
        words = json.loads(command.strip())
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        yield Finding(file, each.place, 'a JSON list of words, such as ["trimoe"]', each.value)


def _assigned(value: str) -> Sequence[str]:
    pairs: list[tuple[str, str]] = re.findall(r"([A-Za-z_]\w*)(=\"[^\"]*\"|=\S*|)", value)
    return [name for name, _ in pairs]


def _last_stage(instructions: Sequence[Instruction]) -> Iterator[Instruction]:
    starts = [i for i, each in enumerate(instructions) if each.name == "FROM"]
    yield from instructions[starts[-1] :] if starts else ()


def environment(stage: Sequence[Instruction]) -> dict[str, str]:
    """Return the variables that a stage sets."""
    found: dict[str, str] = {}
    for each in stage:
        if each.name == "ENV":
            found |= dict(re.findall(r"([A-Za-z_]\w*)=(\"[^\"]*\"|\S*)", each.value))
    return found


def argument(file: DeployFile, name: str) -> str | None:
    """Return the default of a build argument, None if it has none."""
    for each in parse(file.text):
        if each.name == "ARG" and each.value.partition("=")[0] == name:
            return each.value.partition("=")[2] or None
    return None
