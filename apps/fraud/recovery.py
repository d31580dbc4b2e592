"""Snapshots of the feature state and the offsets they cover, and where to start from.

A snapshot is written only after every message that its state contains was
answered and acknowledged, so its positions are also lower bounds of what needs an
answer.  Files are ``.npz`` without pickle, replaced atomically, the last two kept.

A snapshot saves time, not truth: without one, on another node for example, the state is built
anew from the beginning of the log and gives the same features.
"""

import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apps.fraud.state import FeatureState
from apps.fraud.stream import TopicPartition

logger = logging.getLogger(__name__)

KEPT = 2  # the newest, and one to fall back on when it cannot be read
_FORMAT = 1
_PREFIX = "state."


class Snapshot(NamedTuple):
    """A consistent cut between two polls.

    Args:
        arrays: ``FeatureState.snapshot()``.
        positions: First record of each transactions and labels partition that the state lacks.
        owned: Input partitions that the writer answered.
    """

    arrays: Mapping[str, NDArray[Any]]
    positions: Mapping[TopicPartition, int]
    owned: frozenset[TopicPartition]


def write_snapshot(directory: Path, snapshot: Snapshot, sequence: int) -> Path:
    """Write a snapshot atomically and delete all but the newest ``KEPT``.

    Args:
        directory: Of this worker alone; made if missing.
        snapshot: What to write.
        sequence: Rises from snapshot to snapshot, for example milliseconds since the epoch.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"snapshot-{sequence:015d}.npz"
    partial = path.with_suffix(".partial")
    header = {
        "format": _FORMAT,
        "owned": sorted(snapshot.owned),  # NamedTuples are JSON arrays
        "positions": [[*tp, offset] for tp, offset in snapshot.positions.items()],
    }
    arrays: dict[str, Any] = {_PREFIX + name: array for name, array in snapshot.arrays.items()}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with partial.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_directory(directory)
    for old in sorted(directory.glob("snapshot-*.npz"))[:-KEPT]:
        old.unlink()
    return path


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot.

    Raises:
        ValueError, OSError, KeyError, zipfile.BadZipFile: The file is damaged.
    """
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        header = json.loads(archive["header"].tobytes())
        arrays = {
            name.removeprefix(_PREFIX): archive[name]
            for name in archive.files
            if name.startswith(_PREFIX)
        }
    if header["format"] != _FORMAT:
        message = f"expected snapshot format {_FORMAT}, got {header['format']}"
        raise ValueError(message)
    positions = {TopicPartition(topic, p): offset for topic, p, offset in header["positions"]}
    return Snapshot(arrays, positions, frozenset(TopicPartition(*tp) for tp in header["owned"]))


def _readable(directory: Path) -> Iterator[tuple[Path, Snapshot]]:
    for path in sorted(directory.glob("snapshot-*.npz"), reverse=True):
        try:
            yield path, read_snapshot(path)
        except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("snapshot %s is skipped: %s", path, error)


class LogView(NamedTuple):
    """What the log holds: (first, next) offset of all partitions, and commits of owned ones."""

    bounds: Mapping[TopicPartition, tuple[int, int]]
    committed: Mapping[TopicPartition, int]


class Start(NamedTuple):
    """Where a worker begins.

    Args:
        state: Feature state that contains everything before ``positions``.
        positions: Where reading starts.
        open_from: First record of each owned partition that may lack an answer.
    """

    state: FeatureState
    positions: dict[TopicPartition, int]
    open_from: dict[TopicPartition, int]


def find_start(
    directory: Path | None, log: LogView, build_fresh: Callable[[], FeatureState]
) -> Start:
    """Return the newest usable snapshot, or the beginning of the log.

    Args:
        directory: Snapshots of this worker; None for none.
        log: Bounds of all partitions, commits of the owned ones .
        build_fresh: Makes the state to begin with where no snapshot can be used: empty or warm.
    """
    owned = [tp for tp in log.bounds if tp in log.committed]
    for path, snapshot in _readable(directory) if directory is not None else ():
        reason = _why_unusable(snapshot, log, owned)
        if reason:
            logger.warning("snapshot %s is skipped: %s", path, reason)
            continue
        open_from = {tp: max(log.committed[tp], snapshot.positions[tp]) for tp in owned}
        state = FeatureState.restore(dict(snapshot.arrays))
        return Start(state, dict(snapshot.positions), open_from)
    first = {tp: first for tp, (first, _) in log.bounds.items()}
    if trimmed := sorted(f"{tp.topic}[{tp.partition}]" for tp, offset in first.items() if offset):
        logger.warning(
            "no snapshot, and %s lack their first records: features are exact only if the warm-up "
            "table holds those; keep --state where every node sees it",
            ", ".join(trimmed),
        )
    return Start(build_fresh(), first, {tp: log.committed[tp] for tp in owned})


def _why_unusable(snapshot: Snapshot, log: LogView, owned: list[TopicPartition]) -> str | None:
    if snapshot.positions.keys() != log.bounds.keys():
        return "it covers other topics or partitions"
    for tp, offset in snapshot.positions.items():
        first, after = log.bounds[tp]
        if not first <= offset <= after:
            return f"{tp.topic}[{tp.partition}] holds {first}..{after}, it needs {offset}"
    for tp in owned:
        # another worker answered this partition: what lies between was never answered by us
        if tp not in snapshot.owned and log.committed[tp] < snapshot.positions[tp]:
            return f"{tp.topic}[{tp.partition}] was another worker's and is not committed so far"
    return None
