"""One thing that is wrong in a deploy file, and how a key or value is told apart from it."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

LONGEST_LIST = 8  # known keys that are listed; of more only the closest is named


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """A finding.

    Args:
        file: The file, relative to the deploy folder.
        path: Where in it, such as ``applications[0].args.device``; empty for all of it.
        expected: What would be right.
        got: What is there.
    """

    file: str
    path: str
    expected: str
    got: str

    def __str__(self) -> str:
        """Return the finding in one line."""
        where = f"{self.file}: {self.path}" if self.path else self.file
        return " ".join(f"{where}: expected {self.expected}, got {self.got}".split())


def join(*parts: str | int) -> str:
    """Return a path: names joined by dots, positions in brackets."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part:
            path += f".{part}" if path else part
    return path


def among(key: str, known: Iterable[str]) -> str:
    """Return what to expect in place of an unknown key: the closest, or all if they are few."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, 1)
    if close:
        return repr(close[0])
    if not known:
        return "no key"
    if len(known) <= LONGEST_LIST:
        return f"one of {', '.join(known)}"
    return f"one of {', '.join(known[:LONGEST_LIST])}, ... ({len(known)})"


def shown(value: object) -> str:
    """Return a value for a finding, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
