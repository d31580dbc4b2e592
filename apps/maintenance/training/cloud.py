"""A cloud model as it was saved, with what was chosen beside it, ready to teach.

Legend: N rows, D columns, H buckets, C components.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.maintenance.fleet import Floats32
from apps.maintenance.inputs import COLUMNS, Series
from apps.maintenance.protocol import HORIZONS
from apps.maintenance.training.edge_net import EdgeNet, LifeScale, on_columns
from apps.maintenance.training.student import Student
from apps.maintenance.training.train import CALIBRATION
from core_model.checkpoint import CheckpointError, load_checkpoint
from core_model.hazard import TO_VISIT, HazardHead
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.series import SeriesAdapter
from core_model.series_tasks import FORECAST
from core_model.training import predict


@dataclass(frozen=True, slots=True)
class Cloud:
    """A checkpoint with what was chosen beside it.

    Args:
        model: The cloud model.
        version: Its name and number.
        calibration: What ``forecast.json`` holds.
    """

    model: MoETransformer
    version: str
    calibration: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Cloud":
        """Load what ``trimoe maintenance train`` wrote.

        Raises:
            CheckpointError, FileNotFoundError: It is not there, or not whole.
        """
        model, manifest = load_checkpoint(folder)
        text = (folder / CALIBRATION).read_text(encoding="utf-8")
        return cls(model, manifest.version, json.loads(text))

    @property
    def number(self) -> int:
        """The number at the end of the version, from 1."""
        found = re.search(r"\d+$", self.version)
        return max(int(found.group()), 1) if found else 1

    @property
    def caution(self) -> Mapping[int, float]:
        """Factor on the probability of no failure, by horizon."""
        return {h: float(self.calibration["caution"][str(h)]) for h in HORIZONS}

    @property
    def scale(self) -> LifeScale:
        """How its quantiles become an interval."""
        margin, cap = self.calibration["interval_margin"], self.calibration["life_cap_hours"]
        return LifeScale(float(margin), float(cap))

    def answer(self, series: Series) -> Tensor:
        """Return its output columns [N, D_out], trees included, as a platform would."""
        batch = RaggedBatch(
            torch.from_numpy(series.rows),
            torch.from_numpy(series.offsets),
            {"context": torch.from_numpy(series.context)},
        )
        return predict(self.model, FORECAST.name, batch)[0]

    def columns(self, context: Floats32) -> list[int]:
        """Return the columns of an edge model: hours to the visit, what is known, what trees ask."""
        trees = self._parts[0].ensemble
        asked = trees.feature_SN[trees.threshold_SN.isfinite()].unique().tolist()
        known = np.flatnonzero(~np.isnan(context).all(axis=0)).tolist()
        return sorted({TO_VISIT, *known, *(i for i in asked if i < len(COLUMNS))})

    def edge(self, student: Student, columns: list[int]) -> EdgeNet:
        """Return its trees and gate with a student in the place of the sequence experts."""
        adapter, head = self._parts
        trees = on_columns(adapter.ensemble, columns, len(COLUMNS))
        return EdgeNet(student, trees, head.gate, self.scale)

    @property
    def _parts(self) -> tuple[SeriesAdapter, HazardHead]:
        adapter, head = self.model.adapters[FORECAST.name], self.model.heads[FORECAST.name]
        if not isinstance(adapter, SeriesAdapter) or not isinstance(head, HazardHead):
            message = f"{self.version}: expected a model of {FORECAST.name}"
            raise CheckpointError(message)
        return adapter, head
