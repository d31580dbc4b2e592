"""A long sequence in small pieces of work: one chunk of one layer at a time, and exact.

A layer's tokens need the layer below them whole, not the whole model: so the sequence goes
up layer by layer, chunk by chunk, carrying its residual stream and the queries, keys and
values of the layer that is being read.  Between two pieces anything else may run.  The
result is that of ``MoETransformer.forward``; nothing is approximated.

Cost: the queries of a window's halo are computed for both of its neighbours, so a chunk
should be several windows long.

Legend: T tokens, D model, H heads, d head width, L layers, K chosen, n tokens of a chunk.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

from core_model.model import MoETransformer
from core_model.packing import Encoded
from kernels.attention import AttentionPattern, varlen_attention
from kernels.norm import add_rmsnorm

if TYPE_CHECKING:
    from core_model.blocks import Block


def num_pieces(num_tokens: int, chunk_tokens: int, num_layers: int) -> int:
    """Return how many pieces a sequence is cut into: its chunks, below each layer and above all."""
    return -(-num_tokens // chunk_tokens) * (num_layers + 1)


class LongSequence:
    """One sequence on its way up.

    Args:
        model: In evaluation mode.
        encoded: The sequence as its adapter gives it: one sequence, one span.
        chunk_tokens: Tokens of a piece.

    Raises:
        ValueError: More than one span.
    """

    def __init__(self, model: MoETransformer, encoded: Encoded, chunk_tokens: int) -> None:
        if encoded.cu_spans.numel() != 2:
            message = f"expected one span to cut, got {encoded.cu_spans.numel() - 1}"
            raise ValueError(message)
        self._model = model
        self._pattern = encoded.pattern
        self._branch_TD = encoded.tokens_TD
        num_tokens, config = encoded.tokens_TD.shape[0], model.config
        shape = (num_tokens, 3, config.num_heads, config.d_model // config.num_heads)
        self._qkv = [encoded.tokens_TD.new_empty(shape) for _ in range(2)]  # read, written
        self._residual_TD = torch.empty_like(encoded.tokens_TD)
        self.tokens_TD = torch.empty_like(encoded.tokens_TD)
        self.experts_LTK = torch.empty(
            (config.num_layers, num_tokens, config.num_chosen),
            dtype=torch.int32,
            device=encoded.tokens_TD.device,
        )
        self._chunks = [
            slice(start, min(start + chunk_tokens, num_tokens))
            for start in range(0, num_tokens, chunk_tokens)
        ]
        self._layer = 0  # the layer that the next piece hands its tokens to
        self._chunk = 0

    @property
    def is_done(self) -> bool:
        """Whether ``tokens_TD`` and ``experts_LTK`` are complete."""
        return self._layer > len(self._model.blocks)

    def advance(self) -> None:
        """Run the next piece."""
        chunk = self._chunks[self._chunk]
        residual_nD: Tensor | None = None
        branch_nD = self._branch_TD[chunk]
        if self._layer > 0:
            branch_nD, residual_nD = self._finish_layer(self._layer - 1, chunk)
        if self._layer < len(self._model.blocks):
            self._begin_layer(self._layer, chunk, branch_nD, residual_nD)
        else:
            norm = self._model.final_norm
            normed = add_rmsnorm(branch_nD, residual_nD, norm, self._model.config.rms_eps)
            self.tokens_TD[chunk] = normed[0]
        self._chunk += 1
        if self._chunk == len(self._chunks):
            self._chunk, self._layer = 0, self._layer + 1
            self._qkv.reverse()

    def _begin_layer(
        self, layer: int, chunk: slice, branch_nD: Tensor, residual_nD: Tensor | None
    ) -> None:
        """Norm and projection; what the layer's attention will read is complete after all chunks."""
        block = cast("Block", self._model.blocks[layer])
        x_nD, residual_nD = add_rmsnorm(branch_nD, residual_nD, block.attention_norm, block.eps)
        self._qkv[1][chunk] = block.attention.project(x_nD)
        self._residual_TD[chunk] = residual_nD

    def _finish_layer(self, layer: int, chunk: slice) -> tuple[Tensor, Tensor]:
        """Attention and experts of a layer for one chunk; return branch and residual."""
        block = cast("Block", self._model.blocks[layer])
        mixed_nHd = attend_chunk(self._qkv[0], chunk, self._pattern)
        branch_nD = functional.linear(mixed_nHd.flatten(1), block.attention.out)
        x_nD, residual_nD = add_rmsnorm(
            branch_nD, self._residual_TD[chunk], block.moe_norm, block.eps
        )
        branch_nD, self.experts_LTK[layer, chunk] = block.moe(x_nD)
        return branch_nD, residual_nD


def attend_chunk(qkv_T3Hd: Tensor, chunk: slice, pattern: AttentionPattern) -> Tensor:
    """Return what attention over the whole sequence gives the queries of a chunk, [n, H, d]."""
    num_tokens, num_global = qkv_T3Hd.shape[0], pattern.num_global
    if pattern.window is None:
        return _attend_all(qkv_T3Hd, chunk)
    half, first = pattern.window // 2, max(chunk.start, num_global)
    pieces = []
    if chunk.start < num_global:
        pieces.append(_attend_all(qkv_T3Hd, slice(chunk.start, min(chunk.stop, num_global))))
    if first < chunk.stop:
        low, high = max(num_global, first - half), min(num_tokens, chunk.stop + half)
        # beside the globals the slice keeps its own distances; only those decide inside a window
        near = torch.cat([qkv_T3Hd[:num_global], qkv_T3Hd[low:high]])
        cu_seqlens = torch.tensor([0, near.shape[0]], dtype=torch.int32, device=near.device)
        mixed = varlen_attention(near[:, 0], near[:, 1], near[:, 2], cu_seqlens, pattern)
        begin = num_global + first - low
        pieces.append(mixed[begin : begin + chunk.stop - first])
    return torch.cat(pieces)


def _attend_all(qkv_T3Hd: Tensor, queries: slice) -> Tensor:
    """Return attention of some queries over all keys, [n, H, d]."""
    q_HTd, k_HTd, v_HTd = qkv_T3Hd.permute(1, 2, 0, 3)
    mixed = functional.scaled_dot_product_attention(
        q_HTd[:, queries].unsqueeze(0), k_HTd.unsqueeze(0), v_HTd.unsqueeze(0)
    )
    mixed_nHd: Tensor = mixed[0].transpose(0, 1)
    return mixed_nHd
