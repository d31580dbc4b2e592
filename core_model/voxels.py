"""Heads of the volume adapter: a label for each voxel, or one score for the whole window.

Legend: n windows, P window patches, V voxels of a patch, L labels, C channels, D model.
"""

import torch
from torch import Tensor, nn

from core_model.config import MoEConfig
from core_model.packing import Encoded
from core_model.volume import PAIR_CHANNELS, ConvBlock
from core_model.volume_tasks import PATCH, PATCH_VOXELS, Channels, WindowGrid


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
        """Return logits of all voxels [n, L, Z, Y, X], and those at a quarter for training."""
        side, grid = encoded.side, self.grid
        num = side["eighth"].shape[0]
        seen_PC = self.token(tokens_TD[side["is_window"]])
        cells = seen_PC.new_zeros(num * grid.num_patches, seen_PC.shape[1])
        cells[side["spot"]] = seen_PC
        map_ = cells.view(num, grid.z, grid.y, grid.x, -1).permute(0, 4, 1, 2, 3)
        map_ = self.mix(map_ + side["eighth"])
        quarter = self.middle(self.to_quarter(map_) + side["quarter"])
        map_ = self.fine(self.to_half(quarter) + side["half"])
        map_ = self.finest(torch.cat([map_, side["pairs"].to(map_.dtype)], dim=1))
        return spread_pairs(self.logits(map_), self.num_labels), self.deep(quarter)

    def forward(self, tokens_TD: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return one row per window patch and their offsets int32 [n + 1]."""
        logits, _ = self.decode(tokens_TD, encoded)
        scaled = logits / self.temperature
        best, label = scaled.max(dim=1)
        confidence = torch.exp(best - scaled.logsumexp(dim=1))
        spot_P, side = encoded.side["spot"], encoded.side
        rows = [
            patch_rows(label.to(torch.uint8), self.grid)[spot_P],
            patch_rows((confidence * 255.0).round().to(torch.uint8), self.grid)[spot_P],
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
