"""Drift of what a model says and sees, box by box, and the triggers that follow from it.

Two measures, both a population stability index (``edge.spread``):

    forecasts   the newest on a box against its first ones, of the largest hazard and the median
                remaining life; with 500 against 500 unchanged and independent ones its mean is .036
    training    the newest windows, as the box counts them, against the training of its model; of
                the name that has moved most, where the bundle says how its training was spread

Knows: forecasts that came in, counts that boxes report.  Does not know: labels, so it cannot say
that a model is wrong.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.console.bundles import Bundles
from apps.maintenance.edge.spread import DRIFTED, STEADY, Spread
from apps.maintenance.sync.boxes import Box
from apps.maintenance.sync.database import Database
from apps.maintenance.sync.evidence import drift_of

NUM = 500  # forecasts on either side


def psi(first: NDArray[np.float64], newest: NDArray[np.float64]) -> float:
    """Return the population stability index of two samples."""
    spread = Spread.of(first)
    return spread.psi(spread.count(newest))


class Drift:
    """The drift on each box of the version it runs.

    Args:
        database: Of the fleet, with the index of messages.
        bundles: Say how the training of a model was spread.
    """

    def __init__(self, database: Database, bundles: Bundles) -> None:
        self._database = database
        self._bundles = bundles
        self._known: dict[str, tuple[int, dict[str, Any]]] = {}  # by box: last message, figures

    def view(self, boxes: Sequence[Box]) -> Sequence[Mapping[str, Any]]:
        """Return it, largest first, for JSON."""
        found = [
            {
                "agent": box.agent,
                "group": box.group,
                "is_offline": box.is_offline,
                **self._figures(box.agent),
                "training": self._training(box),
            }
            for box in boxes
        ]
        return sorted(
            found, key=lambda each: (-max(each["psi"].values(), default=-1), each["agent"])
        )

    def _training(self, box: Box) -> Mapping[str, Any] | None:
        """Return how far a box's windows are from the training of its model, if that is known."""
        facts = box.facts.get("drift")
        version = facts.get("version") if isinstance(facts, dict) else None
        info = self._bundles.info(version) if isinstance(version, str) else None
        if info is None or not info.reference:
            return None
        psis, num = drift_of(info, [box])
        name = max(psis, key=lambda each: psis[each])
        return {"name": name, "psi": round(psis[name], 3), "windows": num} if num else None

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
