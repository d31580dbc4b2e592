"""Heads of the volume adapter: a label for each voxel, or one score for the whole window.

Legend: n windows, P window patches, V voxels of a patch, L labels, C channels, D model.
"""

import torch
from torch import Tensor, nn

from core_model.config import MoEConfig
from core_model.packing import Encoded
from core_model.paused import Paused, finish
from core_model.volume import PAIR_CHANNELS, ConvBlock, narrowed
from core_model.volume_tasks import LAST_SLABS, PATCH, PATCH_VOXELS, SLABS, Channels, WindowGrid


class VoxelHead(nn.Module):
    """Decoder: tokens meet the feature maps again, coarse to fine.

    Output rows are the window patches as they came, uint8 [P, 2 V + 1]: label of each voxel,
    its probability in 1/255, and the share of the local experts in 1/255.

    Args:
        config: Of the shared blocks.
        grid: Patches of a window.
        channels: Of the adapter's maps.
        num_labels: With 0 for none of them.
    """

    temperature: Tensor

    def __init__(
        self, config: MoEConfig, grid: WindowGrid, channels: Channels, num_labels: int
    ) -> None:
        super().__init__()
        half, quarter, eighth = channels
        self.grid, self.num_labels = grid, num_labels
        self.token = nn.Linear(config.d_model, eighth)
        self.mix = ConvBlock(eighth, eighth)
        self.to_quarter = nn.ConvTranspose3d(eighth, quarter, 2, stride=2)
        self.middle = ConvBlock(quarter, quarter)
        self.to_half = nn.ConvTranspose3d(quarter, half, 2, stride=2)
        self.fine = ConvBlock(half, half)
        self.finest = ConvBlock(half + PAIR_CHANNELS, 2 * half)  # a cell answers for 8 voxels
        self.logits = nn.Conv3d(2 * half, 8 * num_labels, 1)
        self.deep = nn.Conv3d(quarter, num_labels, 1)
        self.register_buffer("temperature", torch.ones(()))

    def decode(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return logits of all voxels [n, L, Z, Y, X], and those at a quarter for training.

        They are bfloat16 while this is trained on CUDA.
        """
        with narrowed(tokens_TD, is_wanted=self.training):
            map_, quarter = finish(self._refine(tokens_TD, encoded, 1))
            return self._read(self.finest(map_)), self.deep(quarter)

    def forward(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return one row per window patch and their offsets int32 [n + 1]."""
        map_, _ = finish(self._refine(tokens_TD, encoded, 1))
        return self._answer(*self._decide(self.finest(map_)), encoded)

    def in_pieces(self, tokens_TD: Tensor, encoded: Encoded) -> Paused[tuple[Tensor, Tensor]]:
        """Do the same in pieces, in evaluation (``TaskSpec.pieces``)."""
        map_, _ = yield from self._refine(tokens_TD, encoded, SLABS)
        found: list[tuple[Tensor, Tensor]] = []
        for slab in self.finest.cut(map_, LAST_SLABS):
            yield
            found.append(self._decide(self.finest.inside(slab)))
        label, confidence = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        return self._answer(label, confidence, encoded)

    def _refine(
        self, tokens_TD: Tensor, encoded: Encoded, slabs: int
    ) -> Paused[tuple[Tensor, Tensor]]:
        """Return the map that the finest convolution reads, and the one at a quarter."""
        side, grid = encoded.side, self.grid
        num = side["eighth"].shape[0]
        seen_PC = self.token(tokens_TD[side["is_window"]])
        cells = seen_PC.new_zeros(num * grid.num_patches, seen_PC.shape[1])
        cells[side["spot"]] = seen_PC
        map_ = cells.view(num, grid.z, grid.y, grid.x, -1).permute(0, 4, 1, 2, 3)
        map_ = self.mix(map_ + side["eighth"])
        yield
        quarter = self.middle(self.to_quarter(map_) + side["quarter"])
        yield
        map_ = self.to_half(quarter) + side["half"]
        map_ = yield from self.fine.in_slabs(map_, slabs)
        return torch.cat([map_, side["pairs"].to(map_.dtype)], dim=1), quarter

    def _read(self, map_: Tensor) -> Tensor:
        return spread_pairs(self.logits(map_), self.num_labels)

    def _decide(self, map_: Tensor) -> tuple[Tensor, Tensor]:
        """Return label and its probability in 1/255 of each voxel, uint8 [n, Z, Y, X]."""
        scaled = self._read(map_) / self.temperature
        best, label = scaled.max(dim=1)
        confidence = torch.exp(best - scaled.logsumexp(dim=1))
        return label.to(torch.uint8), (confidence * 255.0).round().to(torch.uint8)

    def _answer(self, label: Tensor, confidence: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        spot_P, side = encoded.side["spot"], encoded.side
        rows = [
            patch_rows(label, self.grid)[spot_P],
            patch_rows(confidence, self.grid)[spot_P],
            (side["local_share"] * 255.0).round().to(torch.uint8),
        ]
        return torch.cat(rows, dim=1), side["num_patches"]


class WindowHead(nn.Module):
    """One score per window: [n, 1] logits, with the mean share of the local experts."""

    def __init__(self, config: MoEConfig, channels: Channels) -> None:
        super().__init__()
        width = config.d_model + channels.eighth
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.2)
        self.read = nn.Linear(width, 1)

    def forward(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return [n, 2]: logit and share, and the offsets 0 .. n."""
        side, cu = encoded.side, encoded.side["num_patches"]
        num = cu.numel() - 1
        window_P = torch.repeat_interleave(
            torch.arange(num, device=cu.device), cu.diff().long(), output_size=side["spot"].numel()
        )
        count_n1 = cu.diff().unsqueeze(1).clamp(min=1)
        tokens_PD = tokens_TD[side["is_window"]]
        sums_nD = tokens_PD.new_zeros(num, tokens_PD.shape[1]).index_add(0, window_P, tokens_PD)
        share_n1 = side["local_share"].new_zeros(num, 1)
        share_n1 = share_n1.index_add(0, window_P, side["local_share"]) / count_n1
        seen_nC = side["eighth"].mean(dim=(2, 3, 4))
        joined = self.norm(torch.cat([sums_nD / count_n1, seen_nC], dim=1))
        logit_n1 = self.read(self.dropout(joined))
        offsets = torch.arange(num + 1, dtype=torch.int32, device=cu.device)
        return torch.cat([logit_n1, share_n1], dim=1), offsets


def spread_pairs(packed: Tensor, num_labels: int) -> Tensor:
    """Return [n, L, 2Z, 2Y, 2X] from [n, 8 L, Z, Y, X], the inverse of pairs as channels."""
    n, _, z, y, x = packed.shape
    parts = packed.view(n, num_labels, 2, 2, 2, z, y, x)
    return parts.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, num_labels, 2 * z, 2 * y, 2 * x)


def patch_rows(volume: Tensor, grid: WindowGrid) -> Tensor:
    """Return voxels [n, Z, Y, X] as rows of patches [n * patches, V]."""
    cells = volume.view(-1, grid.z, PATCH, grid.y, PATCH, grid.x, PATCH)
    return cells.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, PATCH_VOXELS)
