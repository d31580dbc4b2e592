"""Drift of what a model says: its first forecasts on a box against its newest there.

The measure is the population stability index (PSI) over tenths of the first ones:

    PSI = sum over bins of (new - old) * ln(new / old)        shares of forecasts in the bin

of the largest hazard and of the median remaining life.  Below .1 it is called steady, above .25
drifted; both are the conventional limits.  With 500 against 500 unchanged and independent
forecasts its mean is .036.

Knows: forecasts that came in.  Does not know: labels, so it cannot say that a model is wrong.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.sync.boxes import Box
from apps.maintenance.sync.database import Database

NUM = 500  # forecasts on either side
NUM_BINS = 10
STEADY, DRIFTED = 0.1, 0.25
_LEAST = 0.5 / NUM  # share of an empty bin: half a forecast


def psi(first: NDArray[np.float64], newest: NDArray[np.float64]) -> float:
    """Return the population stability index of two samples."""
    edges = np.unique(np.quantile(first, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
    old, new = (_shares(values, edges) for values in (first, newest))
    return float(((new - old) * np.log(new / old)).sum())


class Drift:
    """The drift on each box of the version it runs.

    Args:
        database: Of the fleet, with the index of messages.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, tuple[int, dict[str, Any]]] = {}  # by box: last message, figures

    def view(self, boxes: Sequence[Box]) -> Sequence[Mapping[str, Any]]:
        """Return it, largest first, for JSON."""
        found = [
            {
                "agent": box.agent,
                "group": box.group,
                "is_offline": box.is_offline,
                **self._figures(box.agent),
            }
            for box in boxes
        ]
        return sorted(
            found, key=lambda each: (-max(each["psi"].values(), default=-1), each["agent"])
        )

    def _figures(self, agent: str) -> dict[str, Any]:
        """Return the figures of a box, measured anew if it has uploaded since."""
        with self._database.transaction() as db:
            row = db.execute("SELECT seq FROM console_read WHERE agent = ?", (agent,)).fetchone()
            seq = row["seq"] if row else 0
            if self._known.get(agent, (-1,))[0] != seq:
                self._known[agent] = seq, _measure(db, agent)
        return self._known[agent][1]


def _measure(db: sqlite3.Connection, agent: str) -> dict[str, Any]:
    row = db.execute(
        "SELECT version FROM console_machines AS m JOIN console_index USING (agent, machine, seq) "
        "WHERE agent = ? AND kind = 'forecast' ORDER BY m.seq DESC LIMIT 1",
        (agent,),
    ).fetchone()
    version = row["version"] if row else ""
    of_version = "FROM console_index WHERE kind = 'forecast' AND agent = ? AND version = ?"
    num = db.execute(f"SELECT count(*) {of_version}", (agent, version)).fetchone()[0]
    measured: dict[str, float] = {}
    if num >= 2 * NUM:
        first, newest = (
            np.array(
                db.execute(
                    f"SELECT peak, life {of_version} ORDER BY seq {order} LIMIT ?",
                    (agent, version, NUM),
                ).fetchall(),
                np.float64,
            )
            for order in ("ASC", "DESC")
        )
        measured = {
            name: round(psi(first[:, idx], newest[:, idx]), 3)
            for idx, name in enumerate(("hazard", "life"))
        }
    return {"version": version, "num": num, "psi": measured, "verdict": _verdict(measured)}


def _verdict(measured: Mapping[str, float]) -> str:
    if not measured:
        return "waiting"
    worst = max(measured.values())
    return "drifted" if worst > DRIFTED else "shifting" if worst >= STEADY else "steady"


def _shares(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=edges.size + 1)
    return np.maximum(counts / values.size, _LEAST)
