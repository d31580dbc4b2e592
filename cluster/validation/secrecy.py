"""Secrets are named in deploy files, never written: values under telling names and flags."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from cluster.validation.finding import Finding, join

NAME: Final = re.compile(
    r"(password|passwd|passphrase|token|secret|api[_-]?key|private[_-]?key|access[_-]?key)$",
    re.IGNORECASE,
)
FLAG: Final = re.compile(
    r"(?:--?(?:redis-)?password|--?token|--requirepass|requirepass)[ =]+[\"']?(?!\$)[^\s\"'$]",
    re.IGNORECASE,
)
SECRET_FLAG: Final = re.compile(r"--?([a-z-]*password|[a-z-]*token|requirepass)", re.IGNORECASE)
ASSIGNMENT: Final = re.compile(r"(?:--env=)?([A-Za-z_][\w-]*)=(.+)", re.DOTALL)
KEY_BLOCK: Final = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
REFERENCE: Final = re.compile(
    r"\$\{[A-Z_]+(:\?[^}]*)?\}"
)  # of the caller's environment, no default
ADVICE: Final = "a reference (secretKeyRef, a secrets entry, ${NAME:?})"


def is_secret_name(name: str) -> bool:
    """Whether a value under this name would be a secret."""
    return NAME.search(name) is not None


def check_secrets(file: str, value: object, at: str = "") -> Iterator[Finding]:
    """Yield every secret that is written out, anywhere in a parsed document."""
    if isinstance(value, dict):
        yield from _check_mapping(file, value, at)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            follows_flag = index > 0 and _is_secret_flag(value[index - 1])
            if follows_flag and isinstance(each, str) and not each.startswith("$"):
                yield Finding(file, join(at, index), ADVICE, f"the value of {value[index - 1]}")
            else:
                yield from check_secrets(file, each, join(at, index))
    elif isinstance(value, str):
        pair = ASSIGNMENT.fullmatch(value)
        is_written = pair is not None and is_secret_name(pair[1]) and _is_literal(pair[2])
        if is_written or FLAG.search(value) or KEY_BLOCK.search(value):
            yield Finding(file, at, ADVICE, "a secret in the text")


def _check_mapping(file: str, value: Mapping[Any, Any], at: str) -> Iterator[Finding]:
    if value.get("kind") == "Secret":
        yield Finding(file, join(at, "kind"), "no Secret in a file; create it by hand", "Secret")
    named = value.get("name")
    if isinstance(named, str) and is_secret_name(named) and _is_literal(value.get("value")):
        yield Finding(file, join(at, "value"), ADVICE, f"the value of {named}")
    for key, each in value.items():
        if isinstance(key, str) and is_secret_name(key) and _is_literal(each):
            yield Finding(file, join(at, key), ADVICE, "a value")
        else:
            yield from check_secrets(file, each, join(at, str(key)))


def _is_secret_flag(value: object) -> bool:
    return isinstance(value, str) and SECRET_FLAG.fullmatch(value) is not None


def _is_literal(value: object) -> bool:
    return isinstance(value, str) and bool(value) and REFERENCE.fullmatch(value) is None
