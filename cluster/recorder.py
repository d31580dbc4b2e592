"""Where measurements go: the seam, and the side of it that goes nowhere.

The other side is ``cluster.ray_metrics``.
"""

from collections.abc import Mapping
from typing import Protocol


class Recorder(Protocol):
    """Takes measurements of the metrics in ``cluster.metrics``."""

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Add to a counter, set a gauge or observe in a histogram.

        Args:
            name: In ``METRICS``.
            value: What was measured.
            labels: A value for each label of the metric, from a bounded set.
        """
        ...


class NullRecorder:
    """Records nothing."""

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Forget the measurement (see ``Recorder``)."""
