"""What organ segmentation brings to joint training (see ``apps.joint.Lesson``).

The windows of a step are a function of the seed and its number, whatever the number of
processes that cut them.

Legend: n windows, L labels, Z Y X voxels, T tokens, D model.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from apps.imaging.calibration import FILE
from apps.imaging.training.calibrate import fit_calibration, fit_temperature
from apps.imaging.training.fit import dice_metrics, hold_out
from apps.imaging.training.known import Known
from apps.imaging.training.loop import (
    TASK,
    Drawn,
    Volume,
    VolumeSettings,
    WindowDraws,
    collate,
    decode_voxels,
    draw_at,
    infer_labels,
    organ_adapter,
    organ_dice,
    to_device,
    voxel_loss,
)
from apps.imaging.training.recorded import RecordedDraws
from apps.imaging.windows import WindowPlan
from core_model.joint import Draw
from core_model.model import MoETransformer
from core_model.packing import Encoded, RaggedBatch


class StepDraws(Dataset[dict[str, Tensor]]):
    """The windows of each step, packed, by its number.

    Args:
        draws: Of the windows.
        batch_size: Windows per step.
    """

    def __init__(self, draws: WindowDraws, batch_size: int) -> None:
        self._draws, self._batch_size = draws, batch_size

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Return what ``collate`` makes of the step's windows."""
        return collate(list(islice(self._draws.stream(step), self._batch_size)))


@dataclass(frozen=True, slots=True, eq=False)
class OrganSource:
    """Windows of labelled volumes (see ``core_model.joint.Source``).

    Args:
        volumes: What to draw from.
        settings: Of windows, loss and rates, and how many processes cut windows.
        seed: Of the draws.
        device: Of the model.
        windows: Folder of those that are drawn already (see ``recorded``), if there is one.
        weight: As of ``Source``.
    """

    volumes: Sequence[Volume]
    settings: VolumeSettings
    seed: int
    device: str
    windows: Path | None = None
    weight: float = 1.0

    @property
    def task(self) -> str:
        """Organs."""
        return TASK

    @property
    def peak_lr(self) -> float:
        """Of the settings."""
        return self.settings.peak_lr

    @property
    def weight_decay(self) -> float:
        """Of the settings."""
        return self.settings.weight_decay

    def steps(self) -> StepDraws:
        """Return the windows of each step."""
        drawn = WindowDraws(self.volumes, self.settings, self.seed)
        return StepDraws(drawn, self.settings.batch_size)

    def draws(self, start: int) -> Iterator[Draw]:
        """Yield what the steps from ``start`` on see; the processes end with the iterator."""
        settings, device = self.settings, self.device
        loader = DataLoader(
            RecordedDraws(self.windows) if self.windows else self.steps(),
            batch_size=None,
            sampler=count(start),
            num_workers=settings.workers,
            pin_memory=device != "cpu",
            generator=torch.Generator(),  # else it draws on the model's, once more in a resumed run
        )
        for packed in loader:
            batch, truth, known_nL = to_device(packed, device)
            loss = partial(_loss, truth, known_nL, settings.deep_weight)
            yield Draw(batch, torch.ones(batch.num_sequences, device=device), loss)


def _loss(
    truth: Tensor,
    known_nL: Tensor,
    deep_weight: float,
    head: nn.Module,
    tokens_TD: Tensor,
    encoded: Encoded,
) -> Tensor:
    full, quarter = decode_voxels(head, tokens_TD, encoded)
    return voxel_loss(full, quarter, truth, known_nL, deep_weight)


@dataclass(frozen=True, eq=False)
class OrganLesson:
    """Labelled cases, a tenth of them held out for temperature and calibration.

    Args:
        data: Where the cases come from, in words.
        cases: Patients or phantoms, two at least.
        settings: Of windows, loss and rates, and how many processes cut windows.
        test: Cases to measure on, by default those held out.
        local: Whether the local experts take part.
        global_: Whether the global ones do.
        windows: Folder of windows that are drawn already, of the one seed that is trained with.
    """

    data: str
    cases: Sequence[Known]
    settings: VolumeSettings = field(default_factory=VolumeSettings)
    test: Sequence[Known] = ()
    local: bool = True
    global_: bool = True
    windows: Path | None = None

    @property
    def task(self) -> str:
        """Organs."""
        return TASK

    def with_experts(self, *, local: bool, global_: bool) -> Self:
        """Return the same with other experts."""
        return replace(self, local=local, global_=global_)

    def source(self, device: str, seed: int) -> OrganSource:
        """Return windows of the cases that are trained on."""
        seen, _ = self._parts
        volumes = [case.volume for case in seen]
        return OrganSource(volumes, self.settings, seed, device, self.windows)

    def prepare(self, model: MoETransformer) -> None:
        """Say which experts take part; on CUDA the convolutions train in bfloat16."""
        adapter = organ_adapter(model)
        adapter.use_experts(local=self.local, global_=self.global_)
        adapter.narrow_training()

    def traffic(self, device: str) -> Iterator[RaggedBatch]:
        """Yield every window of the training cases as they are served, in random order of cases.

        Two windows of each case in place of all, however large it is, loaded experts otherwise:
        utilisation .81 to .86 on other patients (docs/log.md#as-they-are-served).
        """
        seen, _ = self._parts
        order = np.random.default_rng(0).permutation(len(seen))
        return self._packed(_every_window(seen[i] for i in order), device)

    def held_out(self, device: str) -> Iterator[RaggedBatch]:
        """Yield every window of the cases held out, and of those to measure on."""
        return self._packed(_every_window((*self._parts[1], *self.test)), device)

    def finish(self, model: MoETransformer, folder: Path) -> None:
        """Set the temperature of the probabilities, write the calibration."""
        seen, held = self._parts
        fit_temperature(model, held)
        calibration, _ = fit_calibration(model, seen, held)
        calibration.save(folder / FILE)

    def measure(self, model: MoETransformer) -> dict[str, float]:
        """Return the Dice on the model's grid, of each organ and the mean."""
        cases = self.test or self._parts[1]
        dice = [organ_dice(infer_labels(model, each.hu)[0], each.volume.labels) for each in cases]
        return dice_metrics(np.stack(dice))

    @cached_property
    def _parts(self) -> tuple[list[Known], list[Known]]:
        """Cases to train on, cases held out."""
        return hold_out(self.cases)

    def _packed(self, windows: Iterator[Drawn], device: str) -> Iterator[RaggedBatch]:
        while some := list(islice(windows, self.settings.batch_size)):
            yield to_device(collate(some), device)[0]


def _every_window(cases: Iterable[Known]) -> Iterator[Drawn]:
    for case in cases:
        plan = WindowPlan(case.hu)
        for corner in plan.corners:
            yield draw_at(plan, case.volume.labels, corner)
