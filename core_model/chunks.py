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
        task: Whose sequence it is.
        encoded: The sequence as its adapter gives it: one sequence, one span.
        chunk_tokens: Tokens of a piece.

    Raises:
        ValueError: More than one span.
    """

    def __init__(
        self, model: MoETransformer, task: str, encoded: Encoded, chunk_tokens: int
    ) -> None:
        if encoded.cu_spans.numel() != 2:
            message = f"expected one span to cut, got {encoded.cu_spans.numel() - 1}"
            raise ValueError(message)
        self._model = model
        self._owner = model.place_of(task)
        self._branch_TD = encoded.tokens_TD
        num_tokens, config = encoded.tokens_TD.shape[0], model.config
        shape = (num_tokens, 3, config.num_heads, config.d_head)
        rooms = (encoded.tokens_TD.new_empty(shape) for _ in range(2))
        self._read, self._written = (LayerInput(room, encoded.pattern) for room in rooms)
        self._residual_TD = torch.empty_like(encoded.tokens_TD)
        self.tokens_TD = torch.empty_like(encoded.tokens_TD)
        self.experts_LTK = torch.empty(
            (config.num_moe_layers, num_tokens, config.num_chosen),
            dtype=torch.int32,
            device=encoded.tokens_TD.device,
        )
        self._chunks = [
            slice(start, min(start + chunk_tokens, num_tokens))
            for start in range(0, num_tokens, chunk_tokens)
        ]
        self.num_done = 0  # pieces
        self._layer = 0  # the layer that the next piece hands its tokens to
        self._chunk = 0

    @property
    def is_done(self) -> bool:
        """Whether ``tokens_TD`` and ``experts_LTK`` are complete."""
        return self._layer > len(self._model.blocks)

    def advance(self) -> None:
        """Run the next piece."""
        self.num_done += 1
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
            self._read, self._written = self._written, self._read

    def _begin_layer(
        self, layer: int, chunk: slice, branch_nD: Tensor, residual_nD: Tensor | None
    ) -> None:
        """Norm and projection; what the layer's attention will read is complete after all chunks."""
        block = cast("Block", self._model.blocks[layer])
        x_nD, residual_nD = add_rmsnorm(branch_nD, residual_nD, block.attention_norm, block.eps)
        position_n = torch.arange(chunk.start, chunk.stop, device=x_nD.device)
        self._written.put(chunk, block.attention.project(x_nD, position_n))
        self._residual_TD[chunk] = residual_nD

    def _finish_layer(self, layer: int, chunk: slice) -> tuple[Tensor, Tensor]:
        """Attention and experts of a layer for one chunk; return branch and residual."""
        block = cast("Block", self._model.blocks[layer])
        mixed_nHd = self._read.attend(chunk)
        branch_nD = block.attention.merge(mixed_nHd)
        x_nD, residual_nD = add_rmsnorm(
            branch_nD, self._residual_TD[chunk], block.moe_norm, block.eps
        )
        branch_nD, experts_nK = block.moe(x_nD, self._owner)
        if experts_nK is not None:
            self.experts_LTK[layer - self._model.config.dense_layers, chunk] = experts_nK
        return branch_nD, residual_nD


class LayerInput:
    """Queries, keys and values of one layer: they come chunk by chunk, then are read likewise.

    What global queries see of each chunk is taken when it comes, so that no chunk costs more
    than another.

    Args:
        qkv_T3Hd: Room for them.
        pattern: Which tokens see each other.
    """

    def __init__(self, qkv_T3Hd: Tensor, pattern: AttentionPattern) -> None:
        self._qkv_T3Hd = qkv_T3Hd
        self._pattern = pattern
        self._globals: RunningAttention | None = None

    def put(self, chunk: slice, qkv_n3Hd: Tensor) -> None:
        """Take the next chunk."""
        self._qkv_T3Hd[chunk] = qkv_n3Hd
        if self._pattern.window is None or not self._pattern.num_global:
            return
        num_global = min(self._pattern.num_global, chunk.stop)
        keys = chunk
        if self._globals is None or chunk.start < self._pattern.num_global:
            self._globals, keys = (
                RunningAttention(self._qkv_T3Hd[:num_global, 0]),
                slice(chunk.stop),
            )
        self._globals.add(self._qkv_T3Hd[keys, 1], self._qkv_T3Hd[keys, 2])

    def attend(self, chunk: slice) -> Tensor:
        """Return what attention over the whole gives the queries of a chunk, [n, H, d]."""
        num_tokens, num_global = self._qkv_T3Hd.shape[0], self._pattern.num_global
        if self._pattern.window is None:
            return _attend_all(self._qkv_T3Hd, chunk)
        half, first = self._pattern.window // 2, max(chunk.start, num_global)
        pieces = []
        if self._globals is not None and chunk.start < num_global:
            pieces.append(self._globals.result()[chunk])
        if first < chunk.stop:
            low, high = max(num_global, first - half), min(num_tokens, chunk.stop + half)
            # beside globals the slice keeps its own distances; only those decide inside a window
            near = torch.cat([self._qkv_T3Hd[:num_global], self._qkv_T3Hd[low:high]])
            cu_seqlens = torch.tensor([0, near.shape[0]], dtype=torch.int32, device=near.device)
            q_nHd, k_nHd, v_nHd = near.unbind(1)
            mixed = varlen_attention(q_nHd, k_nHd, v_nHd, cu_seqlens, self._pattern)
            begin = num_global + first - low
            pieces.append(mixed[begin : begin + chunk.stop - first])
        return torch.cat(pieces).to(self._qkv_T3Hd.dtype)


class RunningAttention:
    """Attention of a few queries over keys that come piece by piece.

    Args:
        q_gHd: The queries [g, H, d].

    Source:
        Milakov and Gimelshein 2018 (arXiv:1805.02867), algorithm 3.
    """

    def __init__(self, q_gHd: Tensor) -> None:
        self._q_Hgd = q_gHd.transpose(0, 1).float() * q_gHd.shape[2] ** -0.5
        self._top_Hg1 = torch.full_like(self._q_Hgd[..., :1], -torch.inf)
        self._weight_Hg1 = torch.zeros_like(self._top_Hg1)
        self._sum_Hgd = torch.zeros_like(self._q_Hgd)

    def add(self, k_nHd: Tensor, v_nHd: Tensor) -> None:
        """Take in more keys and their values."""
        scores_Hgn = self._q_Hgd @ k_nHd.permute(1, 2, 0).float()
        top_Hg1 = torch.maximum(self._top_Hg1, scores_Hgn.amax(dim=-1, keepdim=True))
        weights_Hgn, keep_Hg1 = (scores_Hgn - top_Hg1).exp(), (self._top_Hg1 - top_Hg1).exp()
        self._weight_Hg1 = self._weight_Hg1 * keep_Hg1 + weights_Hgn.sum(dim=-1, keepdim=True)
        self._sum_Hgd = self._sum_Hgd * keep_Hg1 + weights_Hgn @ v_nHd.transpose(0, 1).float()
        self._top_Hg1 = top_Hg1

    def result(self) -> Tensor:
        """Return the attention over all keys so far, float32 [g, H, d]."""
        return (self._sum_Hgd / self._weight_Hg1).transpose(0, 1)


def _attend_all(qkv_T3Hd: Tensor, queries: slice) -> Tensor:
    """Return attention of some queries over all keys, [n, H, d]."""
    q_HTd, k_HTd, v_HTd = qkv_T3Hd.permute(1, 2, 0, 3)
    mixed = functional.scaled_dot_product_attention(
        q_HTd[:, queries].unsqueeze(0), k_HTd.unsqueeze(0), v_HTd.unsqueeze(0)
    )
    mixed_nHd: Tensor = mixed[0].transpose(0, 1)
    return mixed_nHd
