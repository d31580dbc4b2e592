"""What an edge model computes, in torch: the cloud's trees and gate, and a student.

The student stands in for the sequence experts.  ``student_graph`` writes the same as ONNX.

Legend: N rows, D columns, H buckets, C components.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apps.maintenance.fleet import Floats32
from apps.maintenance.intervals import bounds
from apps.maintenance.training.student import SHAPE, Student
from core_model.hazard import bucket_columns, failed_by
from kernels.trees import TreeEnsemble, tree_ensemble

CHUNK = 4096  # rows of one pass


@dataclass(frozen=True, slots=True)
class LifeScale:
    """How quantiles of log(1 + hours) become an interval.

    Args:
        margin: Added on both sides, of log(1 + hours).
        cap_hours: Hours left are forecast up to here; an open upper end is said as this.
    """

    margin: float
    cap_hours: float


@dataclass(frozen=True, slots=True)
class EdgeNet:
    """An edge model.

    Args:
        student: Stands in for the sequence experts.
        trees: Of the cloud model, on the student's columns and those of a bucket.
        gate: Logits of the cloud's gate [H, C].
        scale: Of the hours left.
    """

    student: Student
    trees: TreeEnsemble
    gate: Tensor
    scale: LifeScale

    @torch.no_grad()
    def forecast(self, context: Floats32) -> tuple[Floats32, Floats32]:
        """Return what the box has to say of rows: hazard [N, C, H] and life [N, 3], hours."""
        parts = [self._forecast(part) for part in torch.from_numpy(context).split(CHUNK)]
        return np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts])

    def _forecast(self, context_ND: Tensor) -> tuple[Floats32, Floats32]:
        found = self.student(context_ND)
        buckets = bucket_columns(context_ND[:, self.student.to_visit])
        repeated = context_ND.unsqueeze(1).expand(-1, buckets.shape[1], -1)
        rows = torch.cat([repeated, buckets], dim=2).flatten(0, 1)
        tree = tree_ensemble(rows, self.trees)[1].view(SHAPE)
        hazard = tree + torch.sigmoid(self.gate) * (found.hazard - tree)
        middle, cap = found.log_hours[:, 1].numpy(), np.log1p(self.scale.cap_hours)
        low, high = bounds(found.log_hours.numpy(), self.scale.margin, cap)
        ends = np.stack([np.minimum(low, middle), middle, np.maximum(high, middle)], axis=1)
        life = np.expm1(ends.clip(0.0, cap)).astype(np.float32)
        return failed_by(hazard).transpose(1, 2).numpy(), life


def on_columns(trees: TreeEnsemble, columns: list[int], width: int) -> TreeEnsemble:
    """Return trees that read some of the columns, and what follows all of them.

    Args:
        trees: On ``width`` columns and those of a bucket.
        columns: Kept, in their new order.
        width: Number of columns before.

    Raises:
        ValueError: A tree splits on a column that goes.
    """
    place = np.full(width + 3, -1, np.int32)
    place[columns] = np.arange(len(columns))
    place[width:] = len(columns) + np.arange(3)
    feature = place[trees.feature_SN.numpy()]
    lost = (feature < 0) & np.isfinite(trees.threshold_SN.numpy())
    if lost.any():
        message = f"expected trees on columns {columns}, {int(lost.sum())} nodes split on others"
        raise ValueError(message)
    return trees._replace(feature_SN=torch.from_numpy(np.maximum(feature, 0)))
