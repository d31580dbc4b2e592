"""Volume adapter: a window of a CT volume as tokens, by local and by global experts.

A sequence is one window, a fixed grid of cubic patches, of which those that hold only air
may be left out; before them come the patches of the whole case, shrunk to a small cube, as
global tokens.  Each region (a patch) has a gate over four experts:

    local    convolutions of narrow and of wide reach over the window's voxels
    global   attention over the neighbourhood and the case, and over window and case whole

What the gate decided is returned for the report.  The convolutions' feature maps go past
the blocks to the head (``core_model.voxels``).

Knows: how a window is cut (``WindowGrid``).  Does not know: DICOM, spacing, organs.

Legend: n windows, Z Y X axes of a feature map, C channels, R rows, P window patches,
D model, G gated experts.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from core_model.config import MoEConfig
from core_model.packing import Encoded, RaggedBatch, offsets_from_lengths, segment_ids
from core_model.paused import Paused, finish
from core_model.volume_tasks import NUM_CASE, PATCH, PATCH_VOXELS, SLABS, Channels, WindowGrid
from kernels.attention import FULL, AttentionPattern, varlen_attention

HU_RANGES = ((-1024.0, 2000.0), (-160.0, 240.0))  # all tissue; soft tissue
PAIR_CHANNELS = 8 * len(HU_RANGES)  # two voxels along each axis are the channels of a cell
NUM_LOCAL, NUM_GLOBAL_EXPERTS = 2, 2
NEAR = AttentionPattern(window=320, num_global=NUM_CASE)  # two layers of 144 patches and more
PLACE_WAVES = 6  # wavelengths of the position code, from 2 m down by halves


class ConvBlock(nn.Sequential):
    """Convolution of three voxels, batch norm, SiLU; the same shape."""

    def __init__(self, num_in: int, num_out: int, dilation: int = 1) -> None:
        super().__init__(
            nn.Conv3d(num_in, num_out, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm3d(num_out),
            nn.SiLU(),
        )

    def in_slabs(self, map_: Tensor, num: int) -> Paused[Tensor]:
        """Compute a map slab by slab; several slabs are for evaluation, and give the same."""
        if num == 1:
            return cast("Tensor", self(map_))
        parts: list[Tensor] = []
        for slab in self.cut(map_, num):
            if parts:
                yield
            parts.append(self.inside(slab))
        return torch.cat(parts, dim=-1)

    def cut(self, map_: Tensor, num: int) -> Iterator[Tensor]:
        """Yield slabs along the last axis, each with the cells beside it that it sees.

        Along another axis torch takes its slow convolution for a thin slab.
        """
        reach, width = self._reach, map_.shape[-1] // num
        padded = functional.pad(map_, (reach, reach))
        for first in range(0, map_.shape[-1], width):
            yield padded[..., first : first + width + 2 * reach]

    def inside(self, slab: Tensor) -> Tensor:
        """Compute a slab of ``cut`` without the cells beside it."""
        conv, reach = cast("nn.Conv3d", self[0]), self._reach
        padding = (reach, reach, 0)
        found = functional.conv3d(slab, conv.weight, padding=padding, dilation=reach)
        return cast("Tensor", self[2](self[1](found)))

    @property
    def _reach(self) -> int:
        return cast("nn.Conv3d", self[0]).dilation[0]


class Halve(nn.Sequential):
    """Two voxels of each axis become one."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(
            nn.Conv3d(num_in, num_out, 2, stride=2, bias=False), nn.BatchNorm3d(num_out), nn.SiLU()
        )


class Relation(nn.Module):
    """One global-relation expert: attention of a fixed pattern inside each window's rows."""

    def __init__(self, config: MoEConfig, pattern: AttentionPattern) -> None:
        super().__init__()
        self.pattern, self.num_heads = pattern, config.num_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_RD: Tensor, cu_rows: Tensor) -> Tensor:
        """Return [R, D]."""
        q, k, v = self.qkv(x_RD).view(x_RD.shape[0], 3, self.num_heads, -1).unbind(1)
        mixed: Tensor = self.out(varlen_attention(q, k, v, cu_rows, self.pattern).flatten(1))
        return mixed


class VolumeAdapter(nn.Module):
    """Rows of voxels -> one token each, and feature maps for the head.

    A row holds the Hounsfield units of one patch; ``extras["cell"]`` [R, 1] says which: from 0
    the patches of the window, from ``grid.num_patches`` those of the shrunk case, which come
    first and complete; ``extras["place"]`` [R, 3] its centre in mm from the case's centre.

    Args:
        config: Of the shared blocks.
        grid: Patches of a window.
        channels: Of the convolutions' maps.
    """

    gate_bias: Tensor

    def __init__(self, config: MoEConfig, grid: WindowGrid, channels: Channels) -> None:
        super().__init__()
        self.grid, d = grid, config.d_model
        half, quarter, eighth = channels
        self.stem = ConvBlock(PAIR_CHANNELS, half)
        self.fine = ConvBlock(half, half)
        self.to_quarter = Halve(half, quarter)
        self.local = nn.ModuleList(ConvBlock(quarter, quarter, 1 + i) for i in range(NUM_LOCAL))
        self.to_eighth = Halve(quarter, eighth)
        self.coarse = ConvBlock(eighth, eighth)
        self.patch = nn.Linear(len(HU_RANGES) * PATCH_VOXELS, d)
        self.place = nn.Linear(6 * PLACE_WAVES, d)
        self.scale = nn.Parameter(torch.randn(2, d) * 0.1)  # of the window, of the case
        self.norm = nn.LayerNorm(d)
        self.relations = nn.ModuleList(Relation(config, pattern) for pattern in (NEAR, FULL))
        self.summary = nn.Linear(eighth, d)
        self.gate = nn.Linear(quarter + d, NUM_LOCAL + NUM_GLOBAL_EXPERTS)
        self.register_buffer("gate_bias", torch.zeros(NUM_LOCAL + NUM_GLOBAL_EXPERTS))
        self._trains_narrow = False

    def narrow_training(self) -> None:
        """Compute in bfloat16 while this is trained on CUDA; what is served stays as it is."""
        self._trains_narrow = True

    def use_experts(self, *, local: bool, global_: bool) -> None:
        """Leave one kind of expert out, to measure what the other is worth alone."""
        allowed = [local] * NUM_LOCAL + [global_] * NUM_GLOBAL_EXPERTS
        bias = [0.0 if each else -torch.inf for each in allowed]
        self.gate_bias.copy_(torch.tensor(bias))

    def forward(self, batch: RaggedBatch) -> Encoded:
        """Return a token per row, one span per window."""
        with narrowed(batch.features, is_wanted=self._trains_narrow and self.training):
            return finish(self._encode(batch, 1))

    def in_pieces(self, batch: RaggedBatch) -> Paused[Encoded]:
        """Do the same in pieces, in evaluation (``TaskSpec.pieces``)."""
        return self._encode(batch, SLABS)

    def _encode(self, batch: RaggedBatch, slabs: int) -> Paused[Encoded]:
        cell_R = batch.extras["cell"][:, 0].long()
        window_R = segment_ids(batch.cu_seqlens, cell_R.numel())
        is_window_R = cell_R < self.grid.num_patches
        scaled_R2V = scale_hu(batch.features)
        rows_RD = self.norm(self._embed(scaled_R2V, batch.extras["place"], is_window_R))

        spot_P = (window_R * self.grid.num_patches + cell_R)[is_window_R]
        pairs = self._pairs(scaled_R2V[is_window_R], spot_P, batch.num_sequences)
        half = yield from self.stem.in_slabs(pairs, slabs)
        yield
        half = half + (yield from self.fine.in_slabs(half, slabs))
        yield
        quarter = self.to_quarter(half)
        region_RC = rows_RD.new_zeros(cell_R.numel(), quarter.shape[1])
        region_RC[is_window_R] = rows_of(functional.avg_pool3d(quarter, 2), spot_P).to(
            rows_RD.dtype
        )
        gates_RG = self._gates(torch.cat([region_RC, rows_RD], dim=1))
        quarter = yield from self._apply_local(quarter, gates_RG[is_window_R], spot_P)
        yield
        eighth = self.coarse(self.to_eighth(quarter))
        yield

        tokens_RD = rows_RD
        for i, relation in enumerate(self.relations):
            weight_R1 = gates_RG[:, NUM_LOCAL + i, None]
            tokens_RD = tokens_RD + weight_R1 * relation(rows_RD, batch.cu_seqlens)
        share_P1 = gates_RG[is_window_R, :NUM_LOCAL].sum(1, keepdim=True)
        local_PD = share_P1 * self.summary(rows_of(eighth, spot_P))
        tokens_RD = tokens_RD.index_add(0, is_window_R.nonzero()[:, 0], local_PD.to(rows_RD.dtype))
        side = {
            "pairs": pairs,
            "half": half,
            "quarter": quarter,
            "eighth": eighth,
            "spot": spot_P,
            "is_window": is_window_R,
            "num_patches": _per_window(is_window_R, batch.cu_seqlens),
            "local_share": share_P1,
        }
        cu = batch.cu_seqlens
        return Encoded(tokens_RD, cu, cu, side, NEAR, NUM_CASE + self.grid.num_patches)

    def _embed(self, scaled_R2V: Tensor, place_R3: Tensor, is_window_R: Tensor) -> Tensor:
        """Return patch, place and scale as one vector per row, [R, D]."""
        waves = 2.0 ** torch.arange(PLACE_WAVES, device=place_R3.device) * (torch.pi / 1000.0)
        phase = (place_R3.unsqueeze(-1) * waves).flatten(1)
        code = torch.cat([phase.sin(), phase.cos()], dim=1)
        scale_RD = self.scale[(~is_window_R).long()]
        embedded: Tensor = self.patch(scaled_R2V.flatten(1)) + self.place(code) + scale_RD
        return embedded

    def _pairs(self, scaled_P2V: Tensor, spot_P: Tensor, num: int) -> Tensor:
        """Return the voxels as a map at 1/2 with pairs as channels, patches left out as air."""
        grid, e, half = self.grid, len(HU_RANGES), PATCH // 2
        # voxels of a patch as [half, 2] an axis: the pairs become channels, the halves the map
        pairs = scaled_P2V.view(-1, e, half, 2, half, 2, half, 2)
        pairs = pairs.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, PATCH_VOXELS // 8, 8 * e)
        full = pairs.new_full((num * grid.num_patches, *pairs.shape[1:]), -1.0)
        full[spot_P] = pairs
        map_ = full.view(num, grid.z, grid.y, grid.x, half, half, half, 8 * e)
        map_ = map_.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(2, 3).flatten(3, 4).flatten(4, 5)
        return map_.contiguous(memory_format=torch.channels_last_3d)

    def _gates(self, region_RC: Tensor) -> Tensor:
        """Return the weight of each expert in each region, [R, G]."""
        return torch.softmax(self.gate(region_RC) + self.gate_bias, dim=1)

    def _apply_local(self, quarter: Tensor, gates_PG: Tensor, spot_P: Tensor) -> Paused[Tensor]:
        num, grid = quarter.shape[0], self.grid
        weights = gates_PG.new_zeros(num * grid.num_patches, NUM_LOCAL)
        weights[spot_P] = gates_PG[:, :NUM_LOCAL]
        weights = weights.view(num, grid.z, grid.y, grid.x, NUM_LOCAL).permute(0, 4, 1, 2, 3)
        weights = functional.interpolate(weights, scale_factor=2, mode="nearest")
        for i, expert in enumerate(self.local):
            yield
            quarter = quarter + weights[:, i : i + 1] * expert(quarter)
        return quarter


def narrowed(x: Tensor, *, is_wanted: bool) -> torch.autocast:
    """Return a context of bfloat16 arithmetic if it is wanted and gradients are taken on CUDA."""
    is_on = is_wanted and torch.is_grad_enabled() and x.is_cuda
    return torch.autocast("cuda", torch.bfloat16, enabled=is_on)


def scale_hu(hu_RV: Tensor) -> Tensor:
    """Return Hounsfield units on each of ``HU_RANGES`` as -1 to 1, [R, ranges, V]."""
    scaled = [
        (hu_RV.clamp(low, high) - low) * (2.0 / (high - low)) - 1.0 for low, high in HU_RANGES
    ]
    return torch.stack(scaled, dim=1)


def rows_of(map_: Tensor, spot_P: Tensor) -> Tensor:
    """Return the channels of a map with one cell per patch at the given patches, [P, C]."""
    return map_.permute(0, 2, 3, 4, 1).flatten(0, 3).index_select(0, spot_P)


def _per_window(is_window_R: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the offsets of the window patches of each sequence, int32 [n + 1]."""
    before = offsets_from_lengths(is_window_R.int())
    return before[cu_seqlens.long()]
