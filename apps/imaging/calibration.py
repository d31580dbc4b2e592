"""What validation cases taught about the model: when to believe it, and which cases are unlike.

Stored beside the weights, as ``FILE``.  The temperature of the probabilities is
part of the model itself.

Legend: C values of a case's profile, L organs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from apps.imaging.reasons import Reason
from apps.imaging.resample import PatientGrid

HU_EDGES = (-2000, -950, -700, -400, -150, -50, 0, 40, 80, 150, 300, 700, 1500, 4000)
FILE = "organs.json"
MM_PER_HALF = 10.0  # a repair that may misplace anatomy so far halves the confidence


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds and the profile of ordinary cases.

    Args:
        least_sure: Per organ, the mean confidence above which it stands alone in its conformal
            set, from the validation cases at ``miss_rate``.
        miss_rate: Share of organs that may be called sure wrongly.
        profile_mean: Mean of ``profile`` over the training cases [C].
        profile_scale: Deviation, never 0 [C].
        farthest: Largest distance of a validation case.
        refer_below: Confidence of a case below which a person looks first.
        sensitivity: Share of the poor validation cases that this refers.
    """

    least_sure: Mapping[str, float]
    miss_rate: float
    profile_mean: tuple[float, ...]
    profile_scale: tuple[float, ...]
    farthest: float
    refer_below: float
    sensitivity: float

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it.

        Raises:
            ValueError: The file is missing or not a calibration.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            pairs = {name: tuple(values[name]) for name in ("profile_mean", "profile_scale")}
            return cls(**{**values, **pairs})
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{path.name}: expected the calibration beside the weights, got {error}"
            raise ValueError(message) from error

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def unusual(self, profile: NDArray[np.float64]) -> float:
        """Return how far a case is from ordinary ones, 1 = as the farthest of validation."""
        return self.distance(profile) / self.farthest

    def distance(self, profile: NDArray[np.float64]) -> float:
        """Return the root mean square of the standardised profile."""
        standard = (profile - np.array(self.profile_mean)) / np.array(self.profile_scale)
        return float(np.sqrt(np.mean(standard**2)))


def profile(grid: PatientGrid, hu: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return what tells an ordinary case from an odd one: its tissues and its geometry, [C]."""
    counts, _ = np.histogram(hu, bins=HU_EDGES)
    shares = np.log10(counts / max(hu.size, 1) + 1e-4)
    steps = np.diff(grid.stack.positions_mm)
    step = float(np.median(steps)) if steps.size else grid.mm
    lengths = np.log(np.array([*hu.shape, step, *grid.stack.pixel_mm], dtype=np.float64))
    return np.concatenate([shares, lengths])


def case_confidence(sure: Sequence[float], unusual: float, reasons: Sequence[Reason]) -> float:
    """Return the confidence of a whole case, 0 to 1.

    The mean over its organs, halved for each ``MM_PER_HALF`` of doubtful millimetres, and
    lowered in proportion where the case is farther out than any validation case.
    """
    cost_mm = sum(reason.cost_mm for reason in reasons)
    mean = float(np.mean(sure)) if sure else 0.0
    return float(mean * 0.5 ** (cost_mm / MM_PER_HALF) / max(unusual, 1.0))
