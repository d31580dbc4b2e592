"""The terms of a forecast: which components and horizons the hazards of a version are of.

Forecasts carry numbers alone; the names are in the signed bundle of the version.  A version that
was never published here, such as one from another plant's stick, has numbers for names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.maintenance.edge.bundle import INFO, BundleInfo, unpack
from apps.maintenance.sync.repository import Repository
from cluster.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Terms:
    """What the hazards of a version are of.

    Args:
        components: Names, in order.
        horizons_h: Hours, rising; None each if nobody knows.
        alert_idx: Of the horizon that counts for alerts.
        threshold: From which a hazard there is an alert; None if nobody knows.
    """

    components: Sequence[str]
    horizons_h: Sequence[float | None]
    alert_idx: int
    threshold: float | None


class Bundles:
    """What was published, read once each.

    Args:
        folder: Of the repository.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, BundleInfo] = {}

    def terms(self, version: str, hazard: Sequence[Sequence[float]]) -> Terms:
        """Return the terms of a version's hazards [C][H]."""
        size = len(hazard), len(hazard[0])
        info = self.info(version)
        if info is None or size != (len(info.components), len(info.horizons_h)):
            names = [f"component {idx + 1}" for idx in range(size[0])]
            return Terms(names, [None] * size[1], size[1] - 1, None)
        alert_idx = info.horizons_h.index(info.alerts.horizon_h)
        return Terms(info.components, info.horizons_h, alert_idx, info.alerts.threshold)

    def info(self, version: str) -> BundleInfo | None:
        """Return what the bundle of a version says; None if it was not published here."""
        if version not in self._known:
            family, _, number = version.rpartition("-")
            try:
                packed = Repository(self._folder, []).read(f"{family}/{number}.tar")
                info = BundleInfo.from_json(unpack(packed)[INFO])
            except (ConfigurationError, OSError):
                return None
            self._known[version] = info
        return self._known[version]
