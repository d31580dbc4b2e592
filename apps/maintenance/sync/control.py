"""The fleet as the platform's other parts see it: the server, the commands and the dashboard.

<folder>/repository    signed metadata and targets
<folder>/fleet.db      boxes, rollouts, audit log
<folder>/operators     <name>.pub of those who may decide
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from apps.maintenance.sync.audit import Entry, read_audit, verify_audit
from apps.maintenance.sync.boxes import Box, list_boxes
from apps.maintenance.sync.database import Database
from apps.maintenance.sync.operators import Operators
from apps.maintenance.sync.rollouts import Rollouts


class Control:
    """Everything about one fleet.

    Args:
        folder: As above; made if there is none.
        clock: Returns now, seconds since 1970.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.repository = folder / "repository"
        self.operators = folder / "operators"
        self.database = Database(folder / "fleet.db")
        self.rollouts = Rollouts(self.database, Operators(self.operators), clock)
        self._clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def boxes(self) -> Sequence[Box]:
        """Return all boxes: version, slot, last seen, what waits there."""
        return list_boxes(self.database, self._clock())

    def audit(self, limit: int = 100) -> Sequence[Entry]:
        """Return the newest entries of the audit log, oldest first."""
        with self.database.transaction() as db:
            return read_audit(db, limit)

    def verify_audit(self) -> str:
        """Check the chain of the audit log; return its end (see ``audit.verify_audit``)."""
        with self.database.transaction() as db:
            return verify_audit(db)

    def state(self) -> Mapping[str, Any]:
        """Return boxes, rollouts and the stable bundle of each group, for JSON."""
        boxes = self.boxes()
        groups = sorted({box.group for box in boxes})
        return {
            "boxes": [asdict(box) for box in boxes],
            "rollouts": [asdict(each) for each in self.rollouts.list()],
            "stable": {group: self.rollouts.stable(group) for group in groups},
        }
