"""What others would train on the same volumes: MONAI's U-Net, and its DynUNet as nnU-Net does.

Same grid, same window size, same time on the same device; each with its own usual loss and
variation of the data, AdamW and a falling rate, inference in Gaussian-weighted windows.

Legend: n windows, L labels, Z Y X voxels.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from monai.inferers.inferer import SlidingWindowInferer
from monai.losses.dice import DiceCELoss
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.unet import UNet
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
)
from monai.transforms.spatial.dictionary import RandAffined
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from apps.imaging.segmentation import ORGANS
from apps.imaging.training.loop import Volume, VolumeSettings
from apps.imaging.windows import PATCH, WINDOW

Kind = Literal["unet", "dynunet"]
EDGE = PATCH * WINDOW[0]
CT_CLIP, CT_MEAN, CT_STD = (-1000.0, 1500.0), 0.0, 300.0
NUM_LABELS = 1 + len(ORGANS)
DEEP_HEADS = 2
PEAK_LR = 1e-3  # of AdamW; nnU-Net's SGD is slow to leave the background (docs/log.md)


def make_net(kind: Kind) -> nn.Module:
    """Return an untrained network of the kind."""
    if kind == "unet":
        return UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=NUM_LABELS,
            channels=(16, 32, 64, 128, 256),
            strides=(2, 2, 2, 2),
            num_res_units=2,
        )
    levels = 5
    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=NUM_LABELS,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=[32, 64, 128, 256, 320],
        deep_supervision=True,
        deep_supr_num=DEEP_HEADS,
    )


def scale_ct(hu: Tensor) -> Tensor:
    """Return clipped, standardised densities."""
    return (hu.clamp(*CT_CLIP) - CT_MEAN) / CT_STD


class BoxDraws(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless random boxes of ``EDGE`` voxels; a share of them around an organ's voxel.

    Args:
        volumes: What to draw from.
        organ_share: Of boxes that hold a voxel of an organ for sure.
        varied: Whether the data is varied as nnU-Net does, mirrors left out: organs have sides.
        seed: Of the draws.
    """

    def __init__(
        self, volumes: Sequence[Volume], organ_share: float, seed: int, *, varied: bool
    ) -> None:
        self._volumes, self._organ_share, self._seed = volumes, organ_share, seed
        self._vary = _variation() if varied else None

    def __iter__(self) -> "BoxDraws":
        """Begin; each worker has a stream of its own."""
        info = get_worker_info()
        self._rng = np.random.default_rng([self._seed, info.id if info else 0])
        if self._vary is not None:
            self._vary.set_random_state(seed=int(self._rng.integers(2**31)))
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Return a scaled box [1, Z, Y, X] and its labels [1, Z, Y, X]."""
        volume = self._volumes[int(self._rng.integers(len(self._volumes)))]
        room = np.array(volume.hu.shape) - EDGE
        present = np.unique(volume.labels)[1:]
        if present.size and self._rng.random() < self._organ_share:
            voxels = np.argwhere(volume.labels == self._rng.choice(present))
            first = voxels[self._rng.integers(len(voxels))] - self._rng.integers(8, EDGE - 8, 3)
        else:
            first = self._rng.integers(0, np.maximum(room, 0) + 1)
        low = np.clip(first, 0, np.maximum(room, 0))
        box = tuple(slice(a, a + EDGE) for a in low)
        short = [(0, max(-r, 0)) for r in room]
        hu = np.pad(volume.hu[box], short, constant_values=-1024).astype(np.float32)
        labels = np.pad(volume.labels[box], short).astype(np.float32)
        found = {"hu": torch.from_numpy(hu)[None], "labels": torch.from_numpy(labels)[None]}
        found["hu"] = scale_ct(found["hu"])
        if self._vary is not None:
            found = self._vary(found)
        return torch.as_tensor(found["hu"]), torch.as_tensor(found["labels"])


def _variation() -> Compose:
    both, image = ("hu", "labels"), ("hu",)
    turn = np.deg2rad(15.0)
    return Compose(
        [
            RandAffined(
                both,
                prob=0.4,
                rotate_range=(turn, turn, turn),
                scale_range=(0.25, 0.25, 0.25),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandGaussianNoised(image, prob=0.1, std=0.1),
            RandGaussianSmoothd(
                image, prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)
            ),
            RandScaleIntensityd(image, prob=0.15, factors=0.25),
            RandAdjustContrastd(image, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        ]
    )


def train_net(
    kind: Kind,
    volumes: Sequence[Volume],
    settings: VolumeSettings,
    device: str,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> nn.Module:
    """Return a network trained for ``settings.seconds`` or ``settings.steps``."""
    torch.manual_seed(seed)
    net = make_net(kind).to(device)
    draws = BoxDraws(volumes, settings.organ_share, seed, varied=kind == "dynunet")
    loader = DataLoader(draws, 2, num_workers=settings.workers, pin_memory=device != "cpu")
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR, weight_decay=1e-5)
    loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    began = time.perf_counter()
    net.train()
    for step, (hu, labels) in enumerate(loader):
        done = max(step / settings.steps, (time.perf_counter() - began) / settings.seconds)
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * (1.0 - done) ** 0.9
        truth = labels.to(device, non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
            outputs = net(hu.to(device, non_blocking=True))
        heads = outputs.unbind(1) if outputs.dim() == 6 else (outputs,)
        weights = [0.5**level for level in range(len(heads))]
        parts = [w * loss_of(head.float(), truth) for w, head in zip(weights, heads, strict=True)]
        loss = torch.stack(parts).sum() / sum(weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 12.0)
        optimizer.step()
        if step % 20 == 0:
            progress(step, settings.steps, float(loss.detach()))
    return net.eval()


@torch.no_grad()
def label_volume(net: nn.Module, hu: np.ndarray, device: str) -> np.ndarray:
    """Return the labels of a volume float32 [Z, Y, X] on the model's grid, uint8."""
    infer = SlidingWindowInferer((EDGE,) * 3, sw_batch_size=4, overlap=0.25, mode="gaussian")
    volume = scale_ct(torch.from_numpy(hu)).to(device)[None, None]
    with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
        logits = infer(volume, net)
    labels: np.ndarray = logits[0].float().argmax(0).to(torch.uint8).cpu().numpy()
    return labels
