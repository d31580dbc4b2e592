"""What a batch is, and its output directory: opened, begun, or refused.

A directory holds one batch.  Whoever opens it must bring the same input and the same settings;
several may have it open at once, each with a shard of the cases or all with the same.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from apps.imaging.batch.claims import Claims
from apps.imaging.batch.journal import Heading, Journal
from apps.imaging.batch.layout import Layout
from apps.imaging.batch.process import Application
from apps.imaging.batch.workers import WorkerSettings
from apps.imaging.reading.source import Inventory, Source
from cluster.errors import ConfigurationError

_CASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # names directories
_SHARD = re.compile(r"(?P<index>\d+)/(?P<count>\d+)")
_OURS = {"batch", "cases"}


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of the cases: every ``count``-th, from ``index``.

    Raises:
        ConfigurationError: There is no such part.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            message = f"shard: expected I/N with 0 <= I < N, got {self.index}/{self.count}"
            raise ConfigurationError(message)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the shard that ``I/N`` names.

        Raises:
            ConfigurationError: It names none.
        """
        parts = _SHARD.fullmatch(text)
        if parts is None:
            message = f"shard: expected I/N such as 0/4, got {text!r:.40}"
            raise ConfigurationError(message)
        return cls(int(parts["index"]), int(parts["count"]))


@dataclass(frozen=True, slots=True)
class Batch:
    """What is to be run.

    Args:
        application: What it is about.
        root: Where the input lies; absolute, the same on every machine.
        inventory: What was found there.
        out: Output directory; absolute, the same on every machine.
        shard: Cases of this driver.
        workers: How workers go about it.
    """

    application: Application
    root: Path
    inventory: Inventory
    out: Path
    shard: Shard = field(default_factory=Shard)
    workers: WorkerSettings = field(default_factory=WorkerSettings)

    @property
    def own_sources(self) -> tuple[Source, ...]:
        """Cases of this driver."""
        return self.inventory.sources[self.shard.index :: self.shard.count]

    def heading(self) -> Heading:
        """Return what identifies the batch.

        Raises:
            ConfigurationError: An id cannot name a directory, or occurs twice.
        """
        case_ids = tuple(each.case_id for each in self.inventory.sources)
        if len(set(case_ids)) < len(case_ids) or not all(map(_CASE_ID.fullmatch, case_ids)):
            message = "input: expected ids of letters, digits, _ and -, each once, got others"
            raise ConfigurationError(message)
        digest = hashlib.sha256()
        for each in self.inventory.sources:
            digest.update(json.dumps([each.case_id, each.label, each.series_uid]).encode())
        settings = json.loads(json.dumps(self.application.settings))
        return Heading(str(self.root), digest.hexdigest(), settings, case_ids)


def open_batch(batch: Batch, *, is_resumed: bool) -> Journal:
    """Open the output directory of a batch, and begin its journal if there is none.

    Raises:
        ConfigurationError: It holds something else; or this batch, and is not to be resumed.
    """
    layout, heading = Layout(batch.out), batch.heading()
    if batch.out.exists() and not layout.journal.is_file():
        _check_empty(batch.out)
    layout.make()
    journal = Journal(layout.journal)
    try:
        with journal.locked():
            if journal.heading is None:
                journal.begin(heading)
            else:
                _check_same(journal.heading, heading)
                if not is_resumed:
                    _check_untouched(batch, journal.claims)
    except BaseException:
        journal.close()
        raise
    return journal


def _check_empty(out: Path) -> None:
    """Refuse a directory of others; directories alone may be left by a driver that was killed."""
    if not out.is_dir() or {path.name for path in out.iterdir()} - _OURS:
        message = "output directory: expected an empty one, or that of a batch, got something else"
        raise ConfigurationError(message)


def _check_same(begun: Heading, asked: Heading) -> None:
    """Refuse to go on with another batch than the one that was begun."""
    if begun.input != asked.input or begun.sources != asked.sources:
        new = len(set(asked.case_ids) - set(begun.case_ids))
        gone = len(set(begun.case_ids) - set(asked.case_ids))
        message = (
            f"output directory: expected the input its batch was begun with, got another or a "
            f"changed one ({new} cases new, {gone} gone); run it into another directory"
        )
        raise ConfigurationError(message)
    if begun.settings != asked.settings:
        differing = sorted(
            name
            for name in begun.settings.keys() | asked.settings.keys()
            if begun.settings.get(name) != asked.settings.get(name)
        )
        message = (
            f"output directory: expected the settings its batch was begun with, "
            f"{', '.join(differing)} differ; run it into another directory"
        )
        raise ConfigurationError(message)


def _check_untouched(batch: Batch, claims: Claims) -> None:
    """Refuse to go on unasked, but for a shard of which nothing was begun yet."""
    own = [claims[each.case_id] for each in batch.own_sources]
    if batch.shard.count == 1 or any(each.num_claims for each in own):
        num = sum(each.result is not None for each in own)
        message = (
            f"output directory: expected an empty one, got a batch with {num} of {len(own)} cases "
            "done; go on with it by --resume, or choose another directory"
        )
        raise ConfigurationError(message)
