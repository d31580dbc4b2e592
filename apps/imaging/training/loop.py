"""Training of the organ task on labelled volumes, patients or phantoms.

Windows are cut by the functions that serve (``apps.imaging.windows``).  An organ that no voxel
of a case is labelled with counts as not contoured there, and not as absent: what is said of it
in that case is neither right nor wrong.

Legend: n windows, L labels, Z Y X voxels, V voxels of a patch.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from apps.imaging.resample import AIR_HU
from apps.imaging.segmentation import ORGANS
from apps.imaging.windows import PATCH, WINDOW, Canvas, Floats, WindowPlan, body_box
from core_model.balance import expert_load, move_bias
from core_model.joint import WeightAverage, decay_groups
from core_model.model import MoETransformer
from core_model.packing import Encoded, RaggedBatch, offsets_from_lengths
from core_model.training import settle_norms

if TYPE_CHECKING:
    from core_model.volume import VolumeAdapter
    from core_model.voxels import VoxelHead

TASK = "organs"
NUM_LABELS = 1 + len(ORGANS)
TURN = np.deg2rad(10.0)  # a case is turned about each axis by at most
STRETCH = 0.1  # and stretched along each by at most this share
VARIED = 0.5  # share of cases; the others stay as sharp as those to be served
WINDOWS_EACH = 2  # drawn from a case before the next one
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A labelled case on the model's grid.

    Args:
        hu: int16 [Z, Y, X].
        labels: 0 = none, uint8 [Z, Y, X].
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]


class Drawn(NamedTuple):
    """A window to train on.

    Args:
        rows: As the model takes them, by name.
        labels: Of its voxels, uint8 [Z, Y, X].
        known: Whether each label is known in the case, bool [L].
    """

    rows: Mapping[str, Tensor]
    labels: Tensor
    known: Tensor


@dataclass(frozen=True, slots=True)
class VolumeSettings:
    """Hyper-parameters.

    Args:
        steps: Optimizer steps at most, by default no limit.
        seconds: Training time at most; the schedule follows whichever is nearer its end.
        batch_size: Windows per step.
        peak_lr: Learning rate at the top of the cycle.
        weight_decay: On matrices and kernels.
        organ_share: Share of windows that are drawn around a voxel of an organ.
        deep_weight: Of the loss at a quarter of the resolution.
        average_decay: Of the weight average, per step.
        bias_rate: Step of the selection bias, falling linearly to 0.
        settling: Batches that the norms are measured on at the end.
        workers: Processes that cut windows; 0 cuts between steps.
    """

    steps: int = 10**9
    seconds: float = float("inf")
    batch_size: int = 6
    peak_lr: float = 5e-3
    weight_decay: float = 0.02
    organ_share: float = 0.7
    deep_weight: float = 0.3
    average_decay: float = 0.995
    bias_rate: float = 0.01
    settling: int = 30
    workers: int = 0


class WindowDraws(IterableDataset[Drawn]):
    """Endless random windows of labelled volumes, as the model takes them.

    Args:
        volumes: What to draw from.
        settings: How often an organ is aimed at.
        seed: Of the draws.
    """

    def __init__(self, volumes: Sequence[Volume], settings: VolumeSettings, seed: int) -> None:
        self._volumes = [_crop(volume) for volume in volumes]
        self._settings, self._seed = settings, seed

    def __iter__(self) -> Iterator[Drawn]:
        """Yield windows without end; each worker has a stream of its own."""
        info = get_worker_info()
        return self.stream(info.id if info else 0)

    def stream(self, number: int) -> Iterator[Drawn]:
        """Yield the windows of a numbered stream without end."""
        rng = np.random.default_rng([self._seed, number])
        while True:
            yield from self.draw(rng)

    def draw(self, rng: np.random.Generator) -> Iterator[Drawn]:
        """Yield windows of one case: shifted against the patch grid, varied in density and shape."""
        volume = self._volumes[int(rng.integers(len(self._volumes)))]
        hu, labels = (vary_shape if rng.random() < VARIED else cut_edges)(volume, rng)
        plan = WindowPlan(vary_density(hu, rng))
        for _ in range(WINDOWS_EACH):
            yield draw_at(plan, labels, self._corner(plan, labels[plan.body], rng))

    def _corner(
        self, plan: WindowPlan, inside: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[int, int, int]:
        """Return the first patch of a window: around an organ's voxel, or anywhere."""
        present = np.unique(inside)[1:]
        room = np.array(plan.size) - np.array(WINDOW)
        if present.size and rng.random() < self._settings.organ_share:
            voxels = np.argwhere(inside == rng.choice(present))
            aim = voxels[rng.integers(len(voxels))] // PATCH
            first = aim - rng.integers(1, np.array(WINDOW) - 1)
        else:
            first = rng.integers(0, room + 1)
        z, y, x = np.clip(first, 0, room)
        return int(z), int(y), int(x)


def _crop(volume: Volume) -> Volume:
    """Return the box of the body: the rest is air."""
    at = body_box(volume.hu.astype(np.float32))
    return Volume(volume.hu[at], volume.labels[at])


def draw_at(plan: WindowPlan, labels: NDArray[np.uint8], corner: tuple[int, int, int]) -> Drawn:
    """Return the window at a corner of a case with these labels, uint8 [Z, Y, X]."""
    window = plan.cut(corner)
    edges = [PATCH * w for w in WINDOW]
    low = [PATCH * c for c in corner]
    target = np.zeros(edges, dtype=np.uint8)
    box = labels[plan.body][tuple(slice(a, a + e) for a, e in zip(low, edges, strict=True))]
    target[tuple(slice(n) for n in box.shape)] = box
    rows = {"hu": window.hu, "cell": window.cell, "place": window.place_mm}
    tensors = {name: torch.from_numpy(each) for name, each in rows.items()}
    known = np.bincount(labels.ravel(), minlength=NUM_LABELS) > 0
    known[0] = True
    return Drawn(tensors, torch.from_numpy(target), torch.from_numpy(known))


def cut_edges(
    volume: Volume, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return a case without up to a patch on the near side of each axis: another patch grid."""
    at = tuple(slice(int(start), None) for start in rng.integers(0, PATCH, 3))
    return volume.hu[at].astype(np.float32), volume.labels[at]


def vary_shape(
    volume: Volume, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return a case as it might lie otherwise: turned, stretched, shifted by less than a patch.

    Never mirrored: organs have sides.
    """
    hu, labels = volume.hu.astype(np.float32), volume.labels
    edges = np.array(hu.shape) + PATCH
    matrix = Rotation.from_euler("zyx", rng.uniform(-TURN, TURN, 3)).as_matrix()
    matrix = matrix * rng.uniform(1.0 - STRETCH, 1.0 + STRETCH, 3)
    # grid_sample wants x y z, each from -1 to 1 over the edge of what is read
    turn = matrix * (edges[None, :] / np.array(hu.shape)[:, None])
    shift = rng.uniform(-1.0, 1.0, 3) * PATCH / np.array(hu.shape)
    theta = np.concatenate([turn[::-1, ::-1], shift[::-1, None]], axis=1).astype(np.float32)
    grid = functional.affine_grid(
        torch.from_numpy(theta)[None], [1, 1, *edges.tolist()], align_corners=False
    )

    def read(values: NDArray[np.float32], mode: str) -> NDArray[np.float32]:
        source = torch.from_numpy(values)[None, None]
        found: NDArray[np.float32] = functional.grid_sample(
            source, grid, mode=mode, padding_mode="zeros", align_corners=False
        )[0, 0].numpy()
        return found

    tissue = read(hu - np.float32(AIR_HU), "bilinear") + np.float32(AIR_HU)
    return tissue, read(labels.astype(np.float32), "nearest").astype(np.uint8)


def vary_density(hu: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return densities as another scanner might give them: scaled, shifted, noisier."""
    tissue = hu > AIR_HU + 1
    gain, offset = rng.normal(1.0, 0.02), rng.normal(0.0, 12.0)
    noise = rng.uniform(0.0, 15.0) * rng.standard_normal(hu.shape, dtype=np.float32)
    return np.where(tissue, hu * np.float32(gain) + np.float32(offset) + noise, hu)


def collate(drawn: Sequence[Drawn]) -> dict[str, Tensor]:
    """Pack windows end to end: rows by name, ``cu_seqlens``; ``labels``, ``known`` by window."""
    lengths = torch.tensor([each.rows["hu"].shape[0] for each in drawn])
    return {
        **{name: torch.cat([each.rows[name] for each in drawn]) for name in drawn[0].rows},
        "cu_seqlens": offsets_from_lengths(lengths),
        "labels": torch.stack([each.labels for each in drawn]),
        "known": torch.stack([each.known for each in drawn]),
    }


def to_device(packed: Mapping[str, Tensor], device: str) -> tuple[RaggedBatch, Tensor, Tensor]:
    """Return a batch, its labels int64 [n, Z, Y, X] and the known ones [n, L] on a device."""
    on = {name: each.to(device, non_blocking=True) for name, each in packed.items()}
    extras = {"cell": on["cell"], "place": on["place"]}
    batch = RaggedBatch(on["hu"], on["cu_seqlens"], extras)
    return batch, on["labels"].long(), on["known"]


def voxel_logits(model: MoETransformer, batch: RaggedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [n, L, Z, Y, X], those at a quarter, and the chosen experts [layers, T, K]."""
    step = model.encode_and_run({TASK: batch})
    full, quarter = decode_voxels(model.heads[TASK], step.pieces[TASK], step.encoded[TASK])
    return full, quarter, step.experts_LTK


def decode_voxels(head: nn.Module, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Return float32 logits [n, L, Z, Y, X] and those at a quarter of the resolution."""
    full, quarter = cast("VoxelHead", head).decode(tokens_TD, encoded)
    return full.float(), quarter.float()


def organ_adapter(model: MoETransformer) -> "VolumeAdapter":
    """Return the adapter of the organ task."""
    return cast("VolumeAdapter", model.adapters[TASK])


def only_known(logits: Tensor, known_nL: Tensor) -> Tensor:
    """Return logits [n, L, ...] in which labels that are not known in a case are no label.

    Label 0 stands for whatever was not contoured: its probability becomes the sum of its own
    and theirs (the marginal loss of Shi et al. 2021, arXiv:2007.03868).
    """
    known = known_nL.view(*known_nL.shape, *[1] * (logits.dim() - 2))
    is_other = ~known
    is_other[:, 0] = True
    other = logits.masked_fill(~is_other, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([other, logits.masked_fill(~known, -torch.inf)[:, 1:]], dim=1)


def dice_and_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross entropy plus one minus the soft Dice of the labels that are present."""
    entropy = functional.cross_entropy(logits, labels)
    shares = torch.softmax(logits, dim=1)
    truth = functional.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(shares.dtype)
    axes = (0, 2, 3, 4)
    overlap, mass, present = (shares * truth).sum(axes), (shares + truth).sum(axes), truth.sum(axes)
    dice = (2.0 * overlap + 1.0) / (mass + 1.0)
    wanted = (present > 0) & (torch.arange(logits.shape[1], device=labels.device) > 0)
    return entropy + ((1.0 - dice) * wanted).sum() / wanted.sum().clamp(min=1)


def voxel_loss(
    full: Tensor, quarter: Tensor, truth: Tensor, known_nL: Tensor, deep_weight: float
) -> Tensor:
    """Return the loss of the logits, and of those at a quarter by their weight.

    Args:
        full: [n, L, Z, Y, X].
        quarter: The same at a quarter of the resolution.
        truth: int64 [n, Z, Y, X].
        known_nL: Whether each label is known in a window's case.
        deep_weight: Of the loss at a quarter.
    """
    coarse = truth[:, 2::4, 2::4, 2::4]
    loss = dice_and_entropy(only_known(full, known_nL), truth)
    return loss + deep_weight * dice_and_entropy(only_known(quarter, known_nL), coarse)


def train_volumes(
    model: MoETransformer,
    volumes: Sequence[Volume],
    settings: VolumeSettings,
    seed: int,
    progress: Progress,
) -> None:
    """Train in place on the model's device; ends with averaged weights.

    Args:
        model: Serves the task ``organs``.
        volumes: At least one.
        settings: Hyper-parameters.
        seed: Of the windows.
        progress: Called with (step, steps, loss) every 20 steps.
    """
    device = str(next(model.parameters()).device)
    draws = WindowDraws(volumes, settings, seed)
    loader = DataLoader(
        draws,
        settings.batch_size,
        num_workers=settings.workers,
        collate_fn=collate,
        pin_memory=device != "cpu",
    )
    optimizer = torch.optim.AdamW(
        decay_groups(list(model.parameters()), settings.weight_decay), lr=settings.peak_lr
    )
    average = WeightAverage(model, settings.average_decay)
    organ_adapter(model).narrow_training()
    began = time.perf_counter()
    model.train()
    windows = iter(loader)
    for step, packed in enumerate(windows):
        done = max(step / settings.steps, (time.perf_counter() - began) / settings.seconds)
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_lr * min(done / 0.05, 1.0) * (1.0 - done) ** 0.9
        batch, truth, known = to_device(packed, device)
        full, quarter, experts_LTK = voxel_logits(model, batch)
        loss = voxel_loss(full, quarter, truth, known, settings.deep_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        load = expert_load(experts_LTK, model.config.num_experts)
        move_bias(model, TASK, load, settings.bias_rate * (1.0 - done))
        if done >= 0.5:
            average.update()
        if step % 20 == 0:
            progress(step, settings.steps, float(loss.detach()))
    average.install()
    settling = islice(windows, settings.settling)
    settle_norms(model, TASK, (to_device(packed, device)[0] for packed in settling))


@torch.no_grad()
def infer_labels(model: MoETransformer, hu: Floats) -> tuple[NDArray[np.uint8], ...]:
    """Return labels, confidence and local share of a case on its grid, as served."""
    device = str(next(model.parameters()).device)
    plan = WindowPlan(hu)
    num_labels = cast("VoxelHead", model.heads[TASK]).num_labels
    canvas = Canvas(plan, hu.shape, num_labels)
    for corner in plan.corners:
        window = plan.cut(corner)
        extras = {
            "cell": torch.from_numpy(window.cell).to(device),
            "place": torch.from_numpy(window.place_mm).to(device),
        }
        cu_seqlens = torch.tensor([0, len(window.hu)], dtype=torch.int32, device=device)
        batch = RaggedBatch(torch.from_numpy(window.hu).to(device), cu_seqlens, extras)
        canvas.add(window, model({TASK: batch}).outputs[TASK][0].cpu().numpy())
    return canvas.join()


def organ_dice(labels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the Dice of each organ in labels of the same shape, NaN where not contoured."""
    dice = np.full(len(ORGANS), np.nan)
    for organ in range(len(ORGANS)):
        said, wanted = labels == organ + 1, truth == organ + 1
        if wanted.any():
            dice[organ] = 2.0 * (said & wanted).sum() / (said.sum() + wanted.sum())
    return dice
