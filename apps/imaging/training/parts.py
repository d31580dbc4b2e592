"""Finished parts of a long evaluation, kept so that they are not made again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[[str], None]


class Parts:
    """Figures by name, as files of a folder if there is one.

    Args:
        work: Where, or None to keep nothing.
    """

    def __init__(self, work: Path | None) -> None:
        self._work = work
        if work:
            work.mkdir(parents=True, exist_ok=True)

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the figures of a part that was finished before."""
        if not self._work or not (file := self._work / f"{name}.json").exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def save(self, name: str, figures: dict[str, Any]) -> None:
        """Keep the figures of a part."""
        if self._work:
            whole = self._work / f"{name}.json.new"
            whole.write_text(json.dumps(figures), encoding="utf-8")
            whole.replace(self._work / f"{name}.json")

    def folder(self, name: str) -> Path | None:
        """Return where the weights of a part belong."""
        return self._work / name if self._work else None
