"""The fleet as the platform's other parts see it: the server, the commands and the dashboard.

<folder>/repository    signed metadata and targets
<folder>/fleet.db      boxes, rollouts, audit log
<folder>/operators     <name>.pub of those who may decide
<folder>/retraining    parts of new trainings, a folder each
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from apps.maintenance.sync.audit import Entry, read_audit, verify_audit
from apps.maintenance.sync.boxes import Box, list_boxes
from apps.maintenance.sync.database import Database
from apps.maintenance.sync.offers import Offer
from apps.maintenance.sync.operators import Operators
from apps.maintenance.sync.policy import Plan
from apps.maintenance.sync.repository import Repository
from apps.maintenance.sync.retrainings import Retrainings
from apps.maintenance.sync.rollout import Rollout, Shadow
from apps.maintenance.sync.rollouts import Rollouts
from apps.maintenance.sync.shadow import History, run_shadow


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
        self.retrainings = Retrainings(self.database, clock)
        self.retraining = folder / "retraining"
        self.clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def begin_rollout(
        self, repository: Repository, offer: Offer, group: str, plan: Plan, history: History
    ) -> Rollout:
        """Let a bundle run beside the stable one on a history, then begin its rollout.

        Raises:
            ConfigurationError: The bundle is not for the group, or another rollout is open there.
        """
        in_use = self.rollouts.stable(group)
        old = None
        if in_use is not None and in_use != offer.path:
            old = run_shadow(repository.read(in_use), history)
        shadow = Shadow(run_shadow(repository.read(offer.path), history), old)
        return self.rollouts.begin(offer, group, plan, shadow)

    def boxes(self) -> Sequence[Box]:
        """Return all boxes: version, slot, last seen, what waits there."""
        return list_boxes(self.database, self.clock())

    def audit(self, limit: int = 100) -> Sequence[Entry]:
        """Return the newest entries of the audit log, oldest first."""
        with self.database.transaction() as db:
            return read_audit(db, limit)

    def verify_audit(self) -> str:
        """Check the chain of the audit log; return its end (see ``audit.verify_audit``)."""
        with self.database.transaction() as db:
            return verify_audit(db)

    def state(self) -> Mapping[str, Any]:
        """Return boxes, rollouts, retrainings and the stable bundle of each group, for JSON."""
        boxes = self.boxes()
        groups = sorted({box.group for box in boxes})
        return {
            "boxes": [asdict(box) for box in boxes],
            "rollouts": [asdict(each) for each in self.rollouts.list()],
            "triggers": [asdict(each) for each in self.retrainings.triggers()],
            "retrainings": [asdict(each) for each in self.retrainings.list()],
            "stable": {group: self.rollouts.stable(group) for group in groups},
        }
