"""History: append-only parquet files by day, made from journal segments.

    FOLDER/plant.json
    FOLDER/journal/00000012.jsonl                        what came since the last sealing
    FOLDER/telemetry/day=2024-01-01/00000003-00000011.parquet   time, machine, sensor, value
    FOLDER/events/day=...                                       time, machine, what, name
    FOLDER/machines/day=...                                     time, machine, model, age_years

A file is named by the segments it holds, appears whole, and makes any file of a narrower range
beside it void.  So a crash between two steps is repaired by doing them again: sealing the same
segment writes the same file.  A message that the broker repeats after a crash lies in two
segments; whoever reads takes the first (``records``).
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apps.maintenance.edge.durable import sync_directory, write_whole
from apps.maintenance.telemetry.journal import Journal
from apps.maintenance.telemetry.messages import MACHINE, TELEMETRY, Message
from apps.maintenance.telemetry.plant import FILE, Plant
from cluster.errors import ConfigurationError

TELEMETRY_TABLE, EVENTS_TABLE, MACHINES_TABLE = "telemetry", "events", "machines"
_ORDER = [("segment", pa.int64()), ("position", pa.int64())]  # of arrival
_KEYS = [("time", pa.timestamp("us")), ("machine", pa.string())]
SCHEMAS = {
    TELEMETRY_TABLE: pa.schema([*_KEYS, ("sensor", pa.string()), ("value", pa.float64()), *_ORDER]),
    EVENTS_TABLE: pa.schema([*_KEYS, ("what", pa.string()), ("name", pa.string()), *_ORDER]),
    MACHINES_TABLE: pa.schema(
        [*_KEYS, ("model", pa.int64()), ("age_years", pa.float64()), *_ORDER]
    ),
}
_NAME = re.compile(r"(\d{8})-(\d{8})\.parquet")


class History:
    """The history of one plant; of one writer.

    Args:
        folder: As above; made if there is none.
        plant: Names and rates; must be those it was begun with.

    Raises:
        ConfigurationError: It was begun for another plant.
    """

    def __init__(self, folder: Path, plant: Plant) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if not path.exists():
            plant.write(path)
        elif Plant.read(path) != plant:
            message = f"{FILE} of the history: expected the plant it was begun with, got another"
            raise ConfigurationError(message)
        self._folder = folder
        self.num_damaged = 0
        last = max((files[1] for _, files in _all_parts(folder)), default=0)
        self._journal = Journal(folder / "journal", last + 1)

    def append(self, messages: Sequence[Message]) -> None:
        """Put messages on disk; after the return they may be acknowledged.

        Raises:
            OSError: The disk is full or closed to us.
        """
        self._journal.append(messages)

    def seal(self) -> None:
        """Move what has come into parquet files, for readers."""
        self._journal.close()
        for number in self._journal.segments():
            messages, damaged = self._journal.read(number)
            self.num_damaged += damaged
            for (table, day), rows in _rows_by_day(messages, number).items():
                self._write(
                    table, day, (number, number), pa.Table.from_pylist(rows, SCHEMAS[table])
                )
            self._journal.drop(number)

    def compact(self, before: datetime) -> None:
        """Join the files of each day that ended before a moment into one."""
        for folder in _days(self._folder):
            day = folder.name.removeprefix("day=")
            parts = parts_of(folder)
            if day < before.date().isoformat() and len(parts) > 1:
                table = pa.concat_tables([pq.read_table(path) for path in parts])
                numbers = [_range_of(path) for path in parts]
                both = min(n[0] for n in numbers), max(n[1] for n in numbers)
                self._write(folder.parent.name, day, both, table)
                for path in set(folder.glob("*.parquet")) - set(parts_of(folder)):
                    path.unlink()

    def _write(self, table: str, day: str, numbers: tuple[int, int], rows: pa.Table) -> None:
        folder = self._folder / table / f"day={day}"
        if not folder.exists():
            folder.mkdir(parents=True)
            sync_directory(folder.parent)
            sync_directory(self._folder)
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd")
        write_whole(folder / f"{numbers[0]:08d}-{numbers[1]:08d}.parquet", sink.getvalue())


def parts_of(folder: Path) -> list[Path]:
    """Return the files of a day that count: those no other file of it contains."""
    paths = sorted(path for path in folder.glob("*.parquet") if _NAME.fullmatch(path.name))
    ranges = {path: _range_of(path) for path in paths}
    return [
        path
        for path in paths
        if not any(
            other != path and first <= ranges[path][0] and ranges[path][1] <= last
            for other, (first, last) in ranges.items()
        )
    ]


def parts(folder: Path, table: str, first_day: str = "") -> list[Path]:
    """Return the files of a table from a day on."""
    days = sorted((folder / table).glob("day=*"))
    return [path for day in days if day.name >= f"day={first_day}" for path in parts_of(day)]


def _days(folder: Path) -> Iterator[Path]:
    for table in SCHEMAS:
        yield from sorted((folder / table).glob("day=*"))


def _all_parts(folder: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    for day in _days(folder):
        for path in day.glob("*.parquet"):
            if _NAME.fullmatch(path.name):
                yield path, _range_of(path)


def _range_of(path: Path) -> tuple[int, int]:
    first, last = path.stem.split("-")
    return int(first), int(last)


def _rows_by_day(
    messages: Sequence[Message], segment: int
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rows of each table and day."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for position, each in enumerate(messages):
        moment = datetime.fromtimestamp(each.time_s, UTC).replace(tzinfo=None)
        day = moment.date().isoformat()
        head = {
            "time": moment,
            "machine": each.machine,
            "segment": segment,
            "position": position,
        }
        if each.kind == TELEMETRY:
            for sensor, value in each.facts["values"].items():
                rows[TELEMETRY_TABLE, day].append({**head, "sensor": sensor, "value": value})
        else:
            table = MACHINES_TABLE if each.kind == MACHINE else EVENTS_TABLE
            rows[table, day].append({**head, **each.facts})
    return rows
