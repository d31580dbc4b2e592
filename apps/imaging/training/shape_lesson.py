"""What AdrenalMNIST3D brings to joint training (see ``apps.joint.Lesson``): its official split.

Legend: n volumes, S voxels an edge, T tokens, D model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from apps.imaging.training.adrenal import (
    TASKS,
    ShapeSettings,
    load_split,
    pack_shapes,
    score_shapes,
    served_shapes,
    shape_loss,
    vary_shapes,
)
from apps.imaging.training.figures import shape_figures
from apps.imaging.training.shape_protocol import DATA
from core_model.joint import Draw, epochs_of
from core_model.model import MoETransformer
from core_model.packing import Encoded, RaggedBatch
from core_model.training import device_of

if TYPE_CHECKING:
    from core_model.volume import VolumeAdapter

Part: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ShapeSource:
    """Shapes in epochs, each mirrored and shifted anew (see ``core_model.joint.Source``).

    Args:
        masks: bool [n, S, S, S], on the model's device.
        classes: 0 or 1, float32 [n].
        settings: Of steps, rates and variation.
        seed: Of order and variation.
        weight: As of ``Source``.
    """

    masks: Tensor
    classes: Tensor
    settings: ShapeSettings
    seed: int
    weight: float = 1.0

    @property
    def task(self) -> str:
        """Of the size."""
        return TASKS[self.masks.shape[1]]

    @property
    def peak_lr(self) -> float:
        """Of the settings."""
        return self.settings.peak_lr

    @property
    def weight_decay(self) -> float:
        """Of the settings."""
        return self.settings.weight_decay

    def draws(self, start: int) -> Iterator[Draw]:
        """Yield what the steps from ``start`` on see."""
        masks, size, most = self.masks, self.settings.batch_size, self.settings.max_shift
        orders = epochs_of(masks.shape[0], size, self.seed, start, masks.device)
        for step, chosen in enumerate(orders, start):
            batch = pack_shapes(vary_shapes(masks[chosen], most, _generator(self.seed, step)))
            own = self.classes[chosen]
            yield Draw(batch, torch.ones_like(own), partial(_loss, own))


def _generator(seed: int, step: int) -> torch.Generator:
    """Return the randomness of a step."""
    (word,) = np.random.SeedSequence([seed, step]).generate_state(1)
    return torch.Generator().manual_seed(int(word))


def _loss(classes: Tensor, head: nn.Module, tokens_TD: Tensor, encoded: Encoded) -> Tensor:
    return shape_loss(head(tokens_TD, encoded)[0], classes)


@dataclass(frozen=True, slots=True, eq=False)
class ShapeLesson:
    """A file of the benchmark: its training part, validation held out, measured on test.

    Args:
        train: Masks bool [n, S, S, S] and classes float32 [n].
        val: The same of the validation part.
        test: The same of the test part.
        settings: Of steps, rates and variation.
    """

    train: Part
    val: Part
    test: Part
    settings: ShapeSettings = field(default_factory=ShapeSettings)

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read AdrenalMNIST3D, either size.

        Raises:
            ValueError: The file is not one of it.
        """
        return cls(load_split(path, "train"), load_split(path, "val"), load_split(path, "test"))

    @property
    def task(self) -> str:
        """Of the size."""
        return TASKS[self.train[0].shape[1]]

    @property
    def data(self) -> str:
        """The benchmark."""
        return DATA

    def source(self, device: str, seed: int) -> ShapeSource:
        """Return its draws."""
        masks, classes = (each.to(device) for each in self.train)
        return ShapeSource(masks, classes, self.settings, seed)

    def prepare(self, model: MoETransformer) -> None:
        """On CUDA the convolutions train in bfloat16."""
        cast("VolumeAdapter", model.adapters[self.task]).narrow_training()

    def traffic(self, device: str) -> Iterator[RaggedBatch]:
        """Yield shapes of the training part as they are."""
        return served_shapes(self.train[0].to(device))

    def held_out(self, device: str) -> Iterator[RaggedBatch]:
        """Yield the validation part and the test part."""
        for masks, _ in (self.val, self.test):
            yield from served_shapes(masks.to(device))

    def finish(self, model: MoETransformer, folder: Path) -> None:
        """Nothing: the logit is served as it is."""

    def measure(self, model: MoETransformer) -> dict[str, float]:
        """Return AUC and accuracy on the test part, each volume seen once."""
        parts, device = {"val": self.val, "test": self.test}, device_of(model)
        scores = {
            name: score_shapes(model, masks.to(device), flips=False).cpu().numpy()
            for name, (masks, _) in parts.items()
        }
        truth = {name: classes.numpy() for name, (_, classes) in parts.items()}
        figures = shape_figures(scores, truth)
        return {name: figures[name] for name in ("auc", "acc")}
