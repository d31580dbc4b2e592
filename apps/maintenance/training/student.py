"""The student: a small network on the context columns that answers as the sequence experts do.

The trees of the cloud model go to the edge as they are (``student_graph``); the student stands
in for the transformer beside them.  Each column becomes cells of a piecewise-linear encoding (Gorishniy, Rubachev, Babenko 2022,
arXiv:2203.05556) between its quantiles, so that thresholds are
within reach of two small layers.  What is unknown is a mask.  The student does not see rows of
telemetry and events: what it knows of them it has from the teacher.

Legend: N rows, D columns, K cells, H buckets, C components.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from apps.maintenance.fleet import Floats32
from apps.maintenance.training.fit import Examples
from core_model.hazard import Quantiles, bucket_columns
from core_model.series_tasks import HORIZONS, NUM_COMPONENTS

LEVELS = (
    0,
    0.002,
    0.01,
    0.03,
    0.06,
    0.1,
    0.2,
    0.35,
    0.5,
    0.65,
    0.8,
    0.9,
    0.94,
    0.97,
    0.99,
    0.998,
    1,
)
# quantiles between which cells lie; close at the ends, where failures announce themselves
HIDDEN = (128, 64)
SHAPE = (-1, len(HORIZONS), NUM_COMPONENTS)
UNKNOWN_VISIT = 0.5  # between inside a bucket and outside, as in the cloud model


class Cells(NamedTuple):
    """Cells of all columns.

    Args:
        column: Which column each reads [K].
        low: Its lower end [K].
        width: [K].
    """

    column: Tensor
    low: Tensor
    width: Tensor


class Lesson(NamedTuple):
    """What a model says of rows, student or teacher.

    Args:
        hazard: Logits of the sequence experts [N, H, C].
        log_hours: Quantiles of log(1 + hours left) [N, 3].
    """

    hazard: Tensor
    log_hours: Tensor


def cells_of(context: Floats32) -> Cells:
    """Return cells between the quantiles of each column, or between its values if they are few."""
    columns, lows, widths = [], [], []
    for idx in range(context.shape[1]):
        known = context[:, idx][~np.isnan(context[:, idx])]
        edges = np.unique(known)
        if edges.size > len(LEVELS):
            edges = np.unique(np.quantile(known, LEVELS))
        columns.append(np.full(max(edges.size - 1, 0), idx))
        lows.append(edges[:-1])
        widths.append(np.diff(edges))
    return Cells(
        torch.from_numpy(np.concatenate(columns)).long(),
        torch.from_numpy(np.concatenate(lows)).float(),
        torch.from_numpy(np.concatenate(widths)).float(),
    )


class Student(nn.Module):
    """Context [N, D] -> hazards and hours left.

    Args:
        cells: Of the columns.
        to_visit: Number of the column with the hours to the coming visit.
        num_columns: D.
    """

    column: Tensor
    low: Tensor
    width: Tensor

    def __init__(self, cells: Cells, to_visit: int, num_columns: int) -> None:
        super().__init__()
        for name, value in cells._asdict().items():
            self.register_buffer(name, value)
        self.to_visit = to_visit
        num_inputs = cells.column.numel() + num_columns + len(HORIZONS)
        self.first = nn.Linear(num_inputs, HIDDEN[0])
        self.second = nn.Linear(*HIDDEN)
        self.outside = nn.Linear(HIDDEN[1], len(HORIZONS) * NUM_COMPONENTS)
        self.inside = nn.Linear(HIDDEN[1], len(HORIZONS) * NUM_COMPONENTS)
        self.hours = Quantiles(HIDDEN[1])

    def forward(self, context_ND: Tensor) -> Lesson:
        """Return the answers."""
        known_ND = ~context_ND.isnan()
        filled_ND = torch.nan_to_num(context_ND)
        share_NK = ((filled_ND[:, self.column] - self.low) / self.width).clamp(0.0, 1.0)
        share_NK = share_NK * known_ND[:, self.column]
        inside_NH = bucket_columns(context_ND[:, self.to_visit])[:, :, 2]
        inside_NH = torch.nan_to_num(inside_NH, nan=UNKNOWN_VISIT)
        x = torch.cat([share_NK, known_ND.float(), inside_NH], dim=1)
        x = functional.silu(self.first(x))
        x = functional.silu(self.second(x))
        hazard = self.outside(x).view(SHAPE)
        hazard = hazard + inside_NH.unsqueeze(2) * self.inside(x).view(SHAPE)
        return Lesson(hazard, self.hours(x))


@dataclass(frozen=True, slots=True)
class StudentSettings:
    """Hyper-parameters, see docs/log.md.

    Args:
        epochs: Passes over the rows.
        batch_size: Rows of a step.
        peak_lr: Learning rate at the top of the cycle.
        weight_decay: On all weights.
        hours_weight: Of the hours left beside the hazards.
    """

    epochs: int = 30
    batch_size: int = 512
    peak_lr: float = 3e-3
    weight_decay: float = 0.01
    hours_weight: float = 0.3


SETTINGS = StudentSettings()


def imitation_loss(student_NHC: Tensor, teacher_NHC: Tensor) -> Tensor:
    """Return the cross entropy of each row [N] with the teacher's hazards as the truth.

    A bucket counts by the teacher's probability of living up to it.
    """
    truth = torch.sigmoid(teacher_NHC)
    lived = torch.cumprod(1.0 - truth, dim=1)
    at_risk = torch.cat([torch.ones_like(lived[:, :1]), lived[:, :-1]], dim=1)
    entropy = functional.binary_cross_entropy_with_logits(student_NHC, truth, reduction="none")
    return (entropy * at_risk).sum(dim=(1, 2))


def fit_student(
    examples: Examples, columns: list[int], teacher: Lesson, seed: int, settings: StudentSettings
) -> Student:
    """Train a student on rows with the teacher's answers.

    Args:
        examples: Rows; what became of them is not used.
        columns: Of the context, that the student reads; the first is the hours to the visit.
        teacher: Its answers on the same rows.
        seed: Of weights and order.
        settings: Hyper-parameters.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    context = examples.series.context[:, columns]
    student = Student(cells_of(context), 0, len(columns))
    context_ND, weight_N = torch.from_numpy(context), torch.from_numpy(examples.weight)
    num_rows = context_ND.shape[0]
    size = min(settings.batch_size, num_rows)
    steps = settings.epochs * (num_rows // size)
    optimizer = torch.optim.AdamW(
        student.parameters(), settings.peak_lr, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.peak_lr, total_steps=steps, pct_start=0.1
    )
    for _ in range(settings.epochs):
        order = torch.randperm(num_rows, generator=generator)
        for chosen in order.split(size)[: num_rows // size]:
            hazard, log_hours = student(context_ND[chosen])
            apart = (log_hours - teacher.log_hours[chosen]).abs().mean(dim=1)
            imitated = imitation_loss(hazard, teacher.hazard[chosen])
            per_row = imitated + settings.hours_weight * apart
            weight = weight_N[chosen] / weight_N[chosen].sum()
            optimizer.zero_grad(set_to_none=True)
            (weight * per_row).sum().backward()
            optimizer.step()
            schedule.step()
    return student.eval()
