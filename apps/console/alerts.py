"""Alerts that boxes uploaded, and who acknowledged them.

An acknowledgement is kept in the fleet's database and in its audit log, in one transaction; the
first one stands.  The name is what somebody at the page has typed: it is no signature, and the
audit log has it as said at the console.
"""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apps.console.bundles import Bundles
from apps.console.uploads import Forecast, parse_upload
from apps.maintenance.sync.audit import append_audit
from apps.maintenance.sync.boxes import MAX_NAME
from apps.maintenance.sync.database import Database
from cluster.errors import ConfigurationError, InvalidRequestError

CONSOLE = "console"  # the actor of what people without a key do here
MAX_SHOWN = 200  # of the open ones, and of the acknowledged ones
_SCHEMA = """CREATE TABLE IF NOT EXISTS acknowledgements (
    agent TEXT NOT NULL, seq INTEGER NOT NULL, name TEXT NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (agent, seq)
) WITHOUT ROWID"""
_ALERTS = (
    "FROM console_index AS i LEFT JOIN acknowledgements AS a USING (agent, seq) "
    "LEFT JOIN messages AS m USING (agent, seq) WHERE i.kind = 'alert'"
)


class Alerts:
    """The alerts of one fleet.

    Args:
        database: Of the fleet, with the index of messages.
        bundles: Say what an alert's hazards are of.
        clock: Returns now, seconds since 1970.
    """

    def __init__(self, database: Database, bundles: Bundles, clock: Callable[[], float]) -> None:
        self._database = database
        self._bundles = bundles
        self._clock = clock
        with database.transaction() as db:
            db.execute(_SCHEMA)

    @property
    def num_open(self) -> int:
        """Alerts that nobody has acknowledged."""
        with self._database.transaction() as db:
            found = db.execute(f"SELECT count(*) {_ALERTS} AND a.time IS NULL").fetchone()
        return int(found[0])

    def view(self) -> Mapping[str, Any]:
        """Return the newest open and acknowledged alerts, for JSON."""
        select = f"SELECT i.agent, i.seq, m.body, a.name, a.time {_ALERTS}"
        with self._database.transaction() as db:
            waiting = db.execute(
                f"{select} AND a.time IS NULL ORDER BY i.moment DESC, i.agent, i.seq DESC LIMIT ?",
                (MAX_SHOWN,),
            ).fetchall()
            done = db.execute(
                f"{select} AND a.time IS NOT NULL ORDER BY a.time DESC LIMIT ?", (MAX_SHOWN,)
            ).fetchall()
        return {"open": self._records(waiting), "acknowledged": self._records(done)}

    def of_machine(self, agent: str, machine: str, since: float) -> Sequence[Mapping[str, Any]]:
        """Return the alerts of a machine from a moment on, oldest first, for JSON."""
        with self._database.transaction() as db:
            rows = db.execute(
                f"SELECT i.agent, i.seq, m.body, a.name, a.time {_ALERTS} AND i.agent = ? "
                "AND i.machine = ? AND i.moment >= ? ORDER BY i.seq DESC LIMIT ?",
                (agent, machine, since, MAX_SHOWN),
            ).fetchall()
        return self._records(rows)[::-1]

    def acknowledge(self, agent: str, seq: int, name: str) -> None:
        """Note that somebody has seen an alert.

        Raises:
            InvalidRequestError: There is no such alert, or no name.
            ConfigurationError: Somebody has acknowledged it before.
        """
        name = name.strip()
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            message = f"name: expected 1 to {MAX_NAME} characters of who acknowledges"
            raise InvalidRequestError(message)
        now = self._clock()
        with self._database.transaction() as db:
            row = db.execute(
                f"SELECT i.machine, m.body, a.name {_ALERTS} AND i.agent = ? AND i.seq = ?",
                (agent, seq),
            ).fetchone()
            if row is None:
                message = f"alert: expected one that came in, got {seq} of box {agent!r:.66}"
                raise InvalidRequestError(message)
            if row["name"] is not None:
                message = f"alert: expected an open one, {row['name']} has acknowledged it"
                raise ConfigurationError(message)
            db.execute("INSERT INTO acknowledgements VALUES (?, ?, ?, ?)", (agent, seq, name, now))
            component = json.loads(row["body"])["component"]
            append_audit(
                db,
                now,
                CONSOLE,
                "acknowledge alert",
                {
                    "said_by": name,
                    "box": agent,
                    "alert": seq,
                    "machine": row["machine"],
                    "component": component,
                },
            )

    def _records(self, rows: Sequence[sqlite3.Row]) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        for row in rows:
            alert = parse_upload(json.loads(row["body"]))
            if isinstance(alert, Forecast):
                found.append(
                    {
                        "agent": row["agent"],
                        "seq": row["seq"],
                        "machine": alert.machine,
                        "moment": alert.moment,
                        "component": alert.component,
                        "life": alert.life,
                        "version": alert.version,
                        "acknowledged_by": row["name"],
                        "acknowledged_at": row["time"],
                        **self._hazard(alert),
                    }
                )
        return found

    def _hazard(self, alert: Forecast) -> Mapping[str, Any]:
        """Return the hazard at the horizon that made it an alert, where its bundle is known."""
        terms = alert.terms or self._bundles.terms(alert.version, alert.hazard)
        if alert.component not in terms.components:
            return {"hazard": alert.peak, "horizon_h": None}
        row = alert.hazard[terms.components.index(alert.component)]
        return {"hazard": row[terms.alert_idx], "horizon_h": terms.horizons_h[terms.alert_idx]}
