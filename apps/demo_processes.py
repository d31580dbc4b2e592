"""The processes of a run as the operating system shows them: what each is, what it holds.

Reads ``/proc``; where there is none (not Linux) the list is empty.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
TORCH = "libtorch_cpu"  # mapped by every process that could run a model
NAME_WIDTH = 56


class Process(NamedTuple):
    """One process.

    Args:
        pid: Its id.
        name: Start of its command line.
        resident_mb: Resident memory.
        has_torch: Whether torch is loaded.
        has_model: Whether it said that it serves a model.
    """

    pid: int
    name: str
    resident_mb: float
    has_torch: bool
    has_model: bool


def list_processes(serving: Collection[int]) -> list[Process]:
    """Return this process and those it started, directly or not, the largest first.

    Args:
        serving: Pids that the replicas gave as theirs.
    """
    found = [_read(pid, serving) for pid in _family(os.getpid())]
    return sorted((each for each in found if each), key=lambda each: -each.resident_mb)


def as_lines(processes: Collection[Process]) -> Iterator[str]:
    """Yield a table."""
    yield f"{'pid':>8}  {'resident':>9}  {'torch':5}  {'model':5}  process"
    for each in processes:
        marks = ["yes" if has else "-" for has in (each.has_torch, each.has_model)]
        yield f"{each.pid:8d}  {each.resident_mb:6.0f} MB  {marks[0]:5}  {marks[1]:5}  {each.name}"


def _family(root: int) -> Collection[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it has ended
            continue
        parent = int(text.rpartition(")")[2].split()[1])  # the name before may hold anything
        children.setdefault(parent, []).append(int(path.parent.name))
    found, new = [root], [root]
    while new:
        new = [child for parent in new for child in children.get(parent, ())]
        found += new
    return found


def _read(pid: int, serving: Collection[int]) -> Process | None:
    folder = PROC / str(pid)
    try:
        words = (folder / "cmdline").read_bytes().split(b"\0")
        status = (folder / "status").read_text()
        maps = (folder / "maps").read_text()
    except OSError:
        return None
    resident = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
    words[0] = words[0].rpartition(b"/")[2]
    name = b" ".join(words).decode(errors="replace").strip()[:NAME_WIDTH]
    mb = sum(resident) / 1024
    return Process(pid, name, mb, TORCH in maps, pid in serving) if resident else None
