"""Rows of transactions as columns that grow at the end."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.fraud.features import Events

_LEAST_CAPACITY = 1024


class EventLog:
    """Columns with room behind the last row; the room doubles when it is used up.

    Attributes:
        columns: With the room; rows from ``size`` on have no meaning.
        size: Number of rows.
    """

    __slots__ = ("columns", "size")

    def __init__(self, events: Events) -> None:
        self.size = 0
        self.columns = self.empty_columns(0)
        self._write(events)

    @staticmethod
    def empty_columns(num_rows: int) -> Events:
        """Return columns of zeros."""
        return Events(
            np.zeros(num_rows, np.int64),
            np.zeros(num_rows, np.int64),
            np.zeros(num_rows, np.int32),
            np.zeros(num_rows, np.int32),
            np.zeros(num_rows, np.int8),
            np.zeros(num_rows, np.float32),
        )

    def view(self) -> Events:
        """Return the rows themselves, without a copy."""
        return self.columns.take(slice(self.size))

    def extend(
        self,
        times: Sequence[int],
        amounts: Sequence[int],
        cards: Sequence[int],
        terminals: Sequence[int],
    ) -> None:
        """Append rows without a label and a ratio."""
        self._write(
            Events(
                np.array(times, np.int64),
                np.array(amounts, np.int64),
                np.array(cards, np.int32),
                np.array(terminals, np.int32),
                np.zeros(len(times), np.int8),
                np.full(len(times), np.nan, np.float32),
            )
        )

    def _write(self, events: Events) -> None:
        end = self.size + events.time_ms.size
        if end > self.columns.time_ms.size:
            grown = self.empty_columns(max(2 * end, _LEAST_CAPACITY))
            _copy(self.view(), grown.take(slice(self.size)))
            self.columns = grown
        _copy(events, self.columns.take(slice(self.size, end)))
        self.size = end


def _copy(source: Iterable[NDArray[Any]], target: Iterable[NDArray[Any]]) -> None:
    for values, column in zip(source, target, strict=True):
        column[:] = values
