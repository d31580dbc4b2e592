"""The tasks on CT volumes that this distribution ships, as entry points of ``trimoe.tasks``."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core_model.tasks import ExtraSpec, TaskSpec

if TYPE_CHECKING:
    from torch import nn

    from core_model.config import MoEConfig

PATCH = 8  # voxels along an edge of a patch
PATCH_VOXELS = PATCH**3
CASE_EDGE = 4  # patches along an edge of the shrunk case
NUM_CASE = CASE_EDGE**3
ORGANS = (
    "Brainstem",
    "SpinalCord",
    "RightParotid",
    "LeftParotid",
    "Esophagus",
    "Larynx",
    "Mandible",
)


class Channels(NamedTuple):
    """Of the convolutions' maps at a half, a quarter and an eighth of the voxels' resolution."""

    half: int
    quarter: int
    eighth: int


class WindowGrid(NamedTuple):
    """Patches of a window along each axis (slices, rows, columns)."""

    z: int
    y: int
    x: int

    @property
    def num_patches(self) -> int:
        """P."""
        return self.z * self.y * self.x


CHANNELS = Channels(24, 48, 96)
ORGAN_GRID = WindowGrid(12, 12, 12)
# A window takes .6 s on a CPU core; its pieces 5 to 25 ms (docs/log.md#pieces).
SLABS, LAST_SLABS = 6, 12  # of each convolution at half the resolution; of the head's last one
PIECES = 3 * SLABS + LAST_SLABS + 7  # five more of the adapter, two of the head
SHAPE_GRIDS = {"adrenal": WindowGrid(4, 4, 4), "adrenal_64": WindowGrid(8, 8, 8)}


def _count_tokens(num_rows: NDArray[np.int32]) -> NDArray[np.int64]:
    return num_rows.astype(np.int64)


def _task(
    name: str,
    grid: WindowGrid,
    outputs: tuple[str, ...],
    num_labels: int = 0,
) -> TaskSpec:
    """Return a task whose sequence is one window; with labels it answers every voxel."""

    def build_adapter(config: "MoEConfig") -> "nn.Module":
        from core_model.volume import VolumeAdapter  # noqa: PLC0415 - torch stays out of here

        return VolumeAdapter(config, grid, CHANNELS)

    def build_head(config: "MoEConfig") -> "nn.Module":
        from core_model.voxels import VoxelHead, WindowHead  # noqa: PLC0415 - likewise

        if num_labels:
            return VoxelHead(config, grid, CHANNELS, num_labels)
        return WindowHead(config, CHANNELS)

    return TaskSpec(
        name=name,
        d_task=PATCH_VOXELS,
        outputs=outputs,
        build_adapter=build_adapter,
        build_head=build_head,
        count_tokens=_count_tokens,
        max_rows=NUM_CASE + grid.num_patches,
        max_tokens=NUM_CASE + grid.num_patches,
        service_class="batch",
        deadline_ms=600_000.0,
        extras={
            "cell": ExtraSpec(width=1, dtype="int32", per="row"),
            "place": ExtraSpec(width=3, per="row"),
        },
        pieces=PIECES if num_labels else 1,
    )


ORGANS_TASK = _task(
    "organs",
    ORGAN_GRID,
    (
        *(f"label_{i}" for i in range(PATCH_VOXELS)),
        *(f"confidence_{i}" for i in range(PATCH_VOXELS)),
        "local_share",
    ),
    num_labels=1 + len(ORGANS),
)
ADRENAL, ADRENAL_64 = (
    _task(name, grid, ("logit", "local_share")) for name, grid in SHAPE_GRIDS.items()
)
