"""AdrenalMNIST3D as windows: shape masks of adrenal glands, normal or not.

A benchmark of the volume adapter on a public split (MedMNIST v2, Yang et al. 2023); no CT
study is read for it.  Masks have no density and no spacing: tissue is given one value, and
a voxel counts as one of the organ task.

Legend: n volumes, S voxels an edge, R rows, V voxels of a patch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from apps.imaging.resample import AIR_HU
from apps.imaging.windows import CASE_EDGE, GRID_MM, PATCH
from core_model.balance import expert_load, move_bias
from core_model.joint import WeightAverage, decay_groups
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch, offsets_from_lengths
from core_model.training import settle_norms
from core_model.volume_tasks import SHAPE_GRIDS

TISSUE_HU = 240.0
TASKS: Mapping[int, str] = {28: "adrenal", 64: "adrenal_64"}
FLIPS = [axes for num in range(4) for axes in combinations((1, 2, 3), num)]  # all eight
SERVED, SETTLING = 64, 16  # volumes of a batch that is not trained on; batches to settle norms
Split = Literal["train", "val", "test"]


@dataclass(frozen=True, slots=True)
class ShapeSettings:
    """Hyper-parameters, chosen on the validation part.

    Args:
        epochs: Passes over the training part.
        batch_size: Volumes per step.
        peak_lr: Learning rate at the top of the cycle.
        weight_decay: On matrices and kernels.
        max_shift: Voxels by which a volume is rolled at most, at 28 an edge.
        average_decay: Of the weight average, per step.
        bias_rate: Step of the selection bias.
    """

    epochs: int = 40
    batch_size: int = 32
    peak_lr: float = 4e-4
    weight_decay: float = 0.05
    max_shift: int = 2
    average_decay: float = 0.998
    bias_rate: float = 0.01


def load_split(path: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Return masks bool [n, S, S, S] and classes float32 [n] of an official part.

    Raises:
        ValueError: The file is not one of AdrenalMNIST3D.
    """
    with np.load(path, allow_pickle=False) as file:
        name = f"{split}_images"
        if name not in file.files:
            message = f"{path.name}: expected {name} among its arrays, got {file.files!r:.120}"
            raise ValueError(message)
        masks, classes = file[name] > 127, file[f"{split}_labels"][:, 0]
    return torch.from_numpy(masks), torch.from_numpy(classes.astype(np.float32))


def pack_shapes(masks: Tensor) -> RaggedBatch:
    """Return volumes bool [n, S, S, S] as one window each; patches that hold only air are left out.

    Most do, and they are alike: they would cost as much as the others and crowd a few experts.
    """
    size, num = masks.shape[1], masks.shape[0]
    grid = SHAPE_GRIDS[TASKS[size]]
    edge = PATCH * grid.z
    before = (edge - size) // 2
    hu = torch.where(masks, TISSUE_HU, AIR_HU)
    hu = functional.pad(hu, (before, edge - size - before) * 3, value=AIR_HU)
    own = _patches(hu, grid.z)
    case = _patches(functional.adaptive_avg_pool3d(hu, PATCH * CASE_EDGE), CASE_EDGE)
    rows = torch.cat([case, own], dim=1)
    cell = torch.cat([grid.num_patches + torch.arange(case.shape[1]), torch.arange(own.shape[1])])
    places = torch.cat([_places(CASE_EDGE, edge), _places(grid.z, edge)])
    kept = (rows > AIR_HU).any(dim=2)
    extras = {
        "cell": cell.to(masks.device).int().expand(num, -1)[kept].unsqueeze(1),
        "place": places.to(masks.device).expand(num, -1, -1)[kept],
    }
    return RaggedBatch(rows[kept], offsets_from_lengths(kept.sum(dim=1)), extras)


def served_shapes(masks: Tensor) -> Iterator[RaggedBatch]:
    """Yield volumes as they are served, ``SERVED`` in a batch."""
    return (pack_shapes(part) for part in masks.split(SERVED))


def _patches(hu: Tensor, edge: int) -> Tensor:
    cells = hu.view(-1, edge, PATCH, edge, PATCH, edge, PATCH).permute(0, 1, 3, 5, 2, 4, 6)
    return cells.reshape(hu.shape[0], edge**3, PATCH**3)


def _places(edge: int, size: int) -> Tensor:
    """Return the centres of a cube's cells from its middle, in mm, [edge ** 3, 3]."""
    along = ((torch.arange(edge) + 0.5) / edge - 0.5) * size * GRID_MM
    return torch.stack(torch.meshgrid(along, along, along, indexing="ij"), dim=-1).view(-1, 3)


def vary_shapes(masks: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Return volumes mirrored and shifted at random; more than that made peers worse."""
    for axis in (1, 2, 3):
        mirrored = torch.rand(masks.shape[0], generator=generator) < 0.5
        where = mirrored.to(masks.device).view(-1, 1, 1, 1)
        masks = torch.where(where, masks.flip(axis), masks)
    most = max(max_shift * masks.shape[1] // 28, 1)
    shift = torch.randint(-most, most + 1, (3,), generator=generator).tolist()
    return masks.roll(shift, dims=(1, 2, 3))


def shape_loss(outputs: Tensor, classes: Tensor) -> Tensor:
    """Return the cross entropy of the head's rows [n, 2] and classes [n]."""
    return functional.binary_cross_entropy_with_logits(outputs[:, 0], classes)


def train_shapes(
    model: MoETransformer,
    masks: Tensor,
    classes: Tensor,
    settings: ShapeSettings,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> None:
    """Train in place; ends with averaged weights.

    Args:
        model: Serves the task of this size, on the device of the masks.
        masks: bool [n, S, S, S].
        classes: 0 or 1, float32 [n].
        settings: Hyper-parameters.
        seed: Of order and variation.
        progress: Called with (epoch, epochs, mean loss).
    """
    task, generator = TASKS[masks.shape[1]], torch.Generator().manual_seed(seed)
    steps_each = masks.shape[0] // settings.batch_size
    optimizer = torch.optim.AdamW(
        decay_groups(list(model.parameters()), settings.weight_decay), lr=settings.peak_lr
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.peak_lr, total_steps=settings.epochs * steps_each, pct_start=0.2
    )
    average = WeightAverage(model, settings.average_decay)
    for epoch in range(settings.epochs):
        model.train()
        order, losses = torch.randperm(masks.shape[0], generator=generator), []
        for chosen in order.split(settings.batch_size)[:steps_each]:
            own = chosen.to(masks.device)
            batch = pack_shapes(vary_shapes(masks[own], settings.max_shift, generator))
            output = model({task: batch})
            loss = shape_loss(output.outputs[task][0], classes[own])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            load = expert_load(output.experts_LTK, model.config.num_experts)
            move_bias(model, task, load, settings.bias_rate * (1.0 - epoch / settings.epochs))
            losses.append(loss.detach())
            if epoch >= settings.epochs // 2:
                average.update()
        progress(epoch, settings.epochs, float(torch.stack(losses).mean()))
    average.install()
    settle_norms(model, task, islice(served_shapes(masks), SETTLING))


@torch.no_grad()
def score_shapes(model: MoETransformer, masks: Tensor, *, flips: bool) -> Tensor:
    """Return the logit of each volume, the mean over its eight mirror images if asked, [n]."""
    task = TASKS[masks.shape[1]]
    parts = []
    for part in masks.split(128):
        views = [part.flip(axes) if axes else part for axes in (FLIPS if flips else [()])]
        logits = [model({task: pack_shapes(view)}).outputs[task][0][:, 0] for view in views]
        parts.append(torch.stack(logits).mean(dim=0))
    return torch.cat(parts)
