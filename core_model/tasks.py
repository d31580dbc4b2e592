"""Tasks: what a request of a task looks like and which modules serve it.

A task is a package, not a patch: any distribution may declare, in its metadata,

    [project.entry-points."trimoe.tasks"]
    fraud = "core_model.builtin_tasks:FRAUD"

and the registry finds it.  The name of the entry point is the name of the task.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

    from core_model.config import MoEConfig

ENTRY_POINT_GROUP = "trimoe.tasks"
COLUMN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")  # columns become keys of JSON bodies


@dataclass(frozen=True, slots=True)
class ExtraSpec:
    """One named array beside the rows: its dtype, its width and what it counts by.

    Args:
        width: Columns.
        dtype: Of its values.
        per: What it has a line for.
        columns: Names of the columns, in order; empty if they have none.

    Raises:
        ValueError: The names are not as many as the columns, or not usable as names.
    """

    width: int
    dtype: str = "float32"
    per: Literal["sequence", "row"] = "sequence"
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_columns(self.columns, self.width)


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """Everything the platform needs to accept, schedule, run and answer a task.

    Args:
        name: Key in requests and checkpoints.
        d_task: Columns of a request row.
        outputs: Names of the output columns, in order.
        build_adapter: config -> module ``(RaggedBatch) -> Encoded``.
        build_head: config -> module ``(tokens_TD, Encoded) -> (outputs [R_out, D_out], offsets)``.
        count_tokens: Row counts int [B] -> tokens per sequence int [B], for the scheduler.
        max_rows: Rows per sequence at most.
        max_tokens: Tokens per sequence at most; what is above ``chunk_tokens`` is run in chunks.
        chunk_tokens: Tokens of a chunk; 0 where a sequence cannot be cut.
        service_class: Default class.
        deadline_ms: Default deadline.
        extras: Arrays a request must carry.
        agree_within: Difference of the first output up to which two versions agree.
        columns: Names of the columns of a request row, in order; empty if they have none.
        pieces: Of about equal work that adapter and head of a sequence are run in on a CPU; if
            there are several, both have ``in_pieces`` (``core_model.pieces``).

    Raises:
        ValueError: The names are not as many as the columns, or not usable as names.
    """

    name: str
    d_task: int
    outputs: tuple[str, ...]
    build_adapter: "Callable[[MoEConfig], nn.Module]"
    build_head: "Callable[[MoEConfig], nn.Module]"
    count_tokens: Callable[[NDArray[np.int32]], NDArray[np.int64]]
    max_rows: int
    max_tokens: int
    service_class: str
    deadline_ms: float
    extras: Mapping[str, ExtraSpec] = field(default_factory=dict)
    chunk_tokens: int = 0
    agree_within: float = 0.1
    columns: tuple[str, ...] = ()
    pieces: int = 1

    def __post_init__(self) -> None:
        _check_columns(self.columns, self.d_task)


def _check_columns(columns: tuple[str, ...], width: int) -> None:
    is_usable = len(set(columns)) == len(columns) and all(map(COLUMN_NAME.fullmatch, columns))
    if columns and not (is_usable and len(columns) == width):
        message = f"columns: expected {width} different names of letters, digits and _, "
        raise ValueError(message + f"got {columns!r:.200}")


@cache
def registered_tasks() -> Mapping[str, TaskSpec]:
    """Return all tasks that installed distributions declare, by name."""
    found: dict[str, TaskSpec] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        spec = point.load()
        if not isinstance(spec, TaskSpec) or spec.name != point.name:
            message = (
                f"entry point {point.name} = {point.value}: expected a TaskSpec named "
                f"{point.name!r}, got {spec!r:.80}"
            )
            raise TypeError(message)
        found[point.name] = spec
    return found
