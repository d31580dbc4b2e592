"""The task and the model of ``benchmarks.kernel_retrieval``.

A sequence begins with a token of its own, on which heads with nothing to look for may rest, and
holds pairs of tokens (key, value) at random places among filler, every key once; at its end stand
queries: all keys again, in another order.  At the place of a query the model names the value.

No position is encoded: a short convolution over neighbours binds a key to its value (Arora et al.
2023, arXiv:2312.04927), and scores grow with the logarithm of the length, without which a longer
sequence dilutes them (Nakanishi 2025, arXiv:2501.19399).  So what was learnt on short sequences
holds on long ones.

Legend: B sequences, n positions of each, D width of the model, H heads, d head width.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.block_sparse import (
    SparsePattern,
    block_scores,
    block_sparse_attention,
    seen_blocks,
)
from kernels.dispatch import Impl, needs_grad

MOST_SCORES = 1 << 28  # of queries and keys at once: 1 GiB
LEAST_WANTED = 0.1  # of a query's attention
USUAL_LENGTH = 128  # at which scores are as they are


class Setup(NamedTuple):
    """Sizes of the task and of the model.

    Args:
        num_pairs: Keys of a sequence, all asked for.
        num_names: Different keys, and different values.
        num_fillers: Different tokens of the filler.
        stages: Length and names of each stage of training; the next begins when this is learnt.
        native_lengths: Positions of a sequence while a pattern itself is trained, each for an equal
            part of that time.
        native: The pattern of each part there: its window is small, and few blocks are chosen, one
            for each pair, since all queries choose together.
        tokens: Of a training step.
        lengths: Positions in the evaluation of these patterns.
        long_lengths: Positions in that of the usual ones; a CPU does the first alone, in minutes.
        usual: The pattern of each part as the kernels run it: larger blocks, spans of as many keys.
        tests: Sequences of each length in the evaluation.
        width: Of the model.
        num_heads: Of each layer.
        num_layers: Of the model.
        rate: Peak of the learning rate.
    """

    num_pairs: int
    num_names: int
    num_fillers: int
    stages: tuple[tuple[int, int], ...]
    native_lengths: tuple[int, ...]
    native: Mapping[str, SparsePattern]
    tokens: int
    lengths: tuple[int, ...]
    long_lengths: tuple[int, ...]
    usual: Mapping[str, SparsePattern]
    tests: int
    width: int
    num_heads: int
    num_layers: int
    rate: float


CHOSEN, POOLED = "chosen", "pooled"
SMALL = SparsePattern(8, 16, 16, query_block=16, key_block=16, pool=16)
SMALL_POOLED = SparsePattern(0, 16, 16, "pooled", query_block=16, key_block=16, pool=8)
SETUP = Setup(
    num_pairs=8,
    num_names=32,
    num_fillers=8,
    stages=((64, 16), (128, 32), (256, 32)),
    native_lengths=(256, 512),
    native={CHOSEN: SMALL, POOLED: SMALL_POOLED},
    tokens=2048,
    lengths=(512, 4096),
    long_lengths=(16384, 65536, 131072),
    usual={CHOSEN: SparsePattern(), POOLED: SparsePattern(0, 64, 64, "pooled", pool=8)},
    tests=16,
    width=64,
    num_heads=2,
    num_layers=2,
    rate=3e-3,
)


class Batch(NamedTuple):
    """Tokens, [B, n]; the value behind each query, [B, queries], counted from 0."""

    tokens: Tensor
    answers: Tensor


def draw(
    setup: Setup, length: int, num_names: int, count: int, generator: torch.Generator
) -> Batch:
    """Return so many sequences that use the first names alone.

    Tokens: 0 begins a sequence, then come the kinds of filler, of keys, of values.
    """
    device, pairs = generator.device, setup.num_pairs
    first_key = 1 + setup.num_fillers
    first_value = first_key + setup.num_names
    keys = torch.rand(count, num_names, generator=generator, device=device).argsort(dim=1)
    keys = keys[:, :pairs]
    values = torch.randint(num_names, keys.shape, generator=generator, device=device)
    tokens = torch.randint(1, first_key, (count, length), generator=generator, device=device)
    tokens[:, 0] = 0
    places = (length - pairs) // 2 - 1
    where = torch.rand(count, places, generator=generator, device=device).argsort(dim=1)
    where = 2 + 2 * where[:, :pairs]  # no pair lies across two spans
    tokens.scatter_(1, where, keys + first_key)
    tokens.scatter_(1, where + 1, values + first_value)
    asked = torch.rand(keys.shape, generator=generator, device=device).argsort(dim=1)
    tokens[:, length - pairs :] = keys.gather(1, asked) + first_key
    return Batch(tokens, values.gather(1, asked))


class Layer(nn.Module):
    """Attention, then a feed-forward."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        d = setup.width
        self.num_heads = setup.num_heads
        self.norms = nn.ModuleList([nn.RMSNorm(d), nn.RMSNorm(d)])
        self.mix = nn.Parameter(torch.tensor([0.1, 1.0, 0.1]).repeat(d, 1).unsqueeze(1))
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.sharpness = nn.Parameter(torch.ones(setup.num_heads, 1))
        self.out = nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d, bias=False)

    def project(self, x_BnD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, [n, B * H, d]: sequences lie beside their heads."""
        mix = self.mix.to(x_BnD.dtype)
        x_BDn = self.norms[0](x_BnD).transpose(1, 2)
        x_BDn = functional.conv1d(x_BDn, mix, padding=1, groups=x_BDn.shape[1])
        qkv = self.qkv(x_BDn.transpose(1, 2)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 1, 0, 3, 4).unbind(0)
        growth = math.log(x_BnD.shape[1]) / math.log(USUAL_LENGTH)
        q = (q * (self.sharpness * growth)).to(k.dtype)
        return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)

    def forward(self, x_BnD: Tensor, pattern: SparsePattern | None) -> Tensor:
        """Return the stream behind the layer."""
        q, k, v = self.project(x_BnD)
        if pattern is None:
            query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            mixed = functional.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1)
        else:
            cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
            # in training, on few positions: masked scores of all keys take few launches
            form: Impl = "reference" if q.is_cuda and needs_grad(q) else "auto"
            mixed = block_sparse_attention(q, k, v, cu_seqlens, pattern, impl=form)
        mixed_BnHd = mixed.unflatten(1, (-1, self.num_heads)).transpose(0, 1)
        x_BnD = x_BnD + self.out(mixed_BnHd.flatten(2))
        out_BnD: Tensor = x_BnD + self.down(functional.gelu(self.up(self.norms[1](x_BnD))))
        return out_BnD


class Recaller(nn.Module):
    """Tokens in, a value named at each query."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.num_queries, self.num_names = setup.num_pairs, setup.num_names
        num_tokens = 1 + setup.num_fillers + 2 * setup.num_names
        self.embedding = nn.Embedding(num_tokens, setup.width)
        self.layers = nn.ModuleList([Layer(setup) for _ in range(setup.num_layers)])
        self.norm = nn.RMSNorm(setup.width)
        self.head = nn.Linear(setup.width, setup.num_names, bias=False)

    def forward(self, batch: Batch, pattern: SparsePattern | None) -> Tensor:
        """Return logits of the values at the queries, [B, queries, names]."""
        x_BnD = self.embedding(batch.tokens)
        for layer in self.layers:
            x_BnD = layer(x_BnD, pattern)
        logits: Tensor = self.head(self.norm(x_BnD[:, -self.num_queries :]))
        return logits


class Covered(NamedTuple):
    """What dense attention would give to the blocks that a pattern attends to.

    Args:
        mass: Share of each row, head and layer, [layers, B * H, n].
        best: The most that as many blocks could have; of each block of queries, [layers, B * H, I].
        keys: Share of blocks attended to, the same.
        misled: Cross-entropy of the scores that blocks are chosen by, in nats, the same.
    """

    mass: Tensor
    best: Tensor
    keys: Tensor
    misled: Tensor


def covered(model: Recaller, batch: Batch, pattern: SparsePattern) -> Covered:
    """Return what a pattern covers of the attention in each layer of the dense model."""
    parts = []
    x_BnD = model.embedding(batch.tokens)
    for layer in model.layers:
        assert isinstance(layer, Layer)  # noqa: S101 - a list of modules has no types
        q, k, _ = layer.project(x_BnD)
        with torch.autocast(q.device.type, enabled=False):
            parts.append(_covered(q.float(), k.float(), pattern))
        x_BnD = layer(x_BnD, None)
    return Covered(*(torch.stack(each) for each in zip(*parts, strict=True)))


def _covered(q_nHd: Tensor, k_nHd: Tensor, pattern: SparsePattern) -> tuple[Tensor, ...]:
    seen_HIJ = seen_blocks(q_nHd, k_nHd, pattern)
    mass, best, wanted = [], [], []
    each = pattern.query_block
    rows = each * max(1, MOST_SCORES // (each * k_nHd.shape[0] * k_nHd.shape[1]))
    for first, q_QHd in zip(range(0, len(q_nHd), rows), q_nHd.split(rows), strict=True):
        score_HQK = torch.einsum("qhd,khd->hqk", q_QHd, k_nHd) * q_nHd.shape[2] ** -0.5
        weight_HQK = functional.pad(score_HQK.softmax(dim=2), (0, -len(k_nHd) % pattern.key_block))
        mass_HQJ = weight_HQK.unflatten(2, (-1, pattern.key_block)).sum(3)
        block_Q = torch.arange(first, first + len(q_QHd), device=q_nHd.device) // each
        mass.append((mass_HQJ * seen_HIJ[:, block_Q]).sum(2))
        for part in mass_HQJ.detach().split(each, dim=1):
            best.append(part.mean(1))
            wanted.append(part.amax(1))  # a block is worth what it is to some query
    sorted_HIJ = torch.stack(best, dim=1).sort(dim=2, descending=True).values
    last_HI1 = seen_HIJ.sum(2, keepdim=True) - 1
    best_HI = sorted_HIJ.cumsum(2).gather(2, last_HI1)[:, :, 0]
    misled_HI = _misled(q_nHd, k_nHd, pattern, torch.stack(wanted, dim=1))
    return torch.cat(mass, dim=1), best_HI, seen_HIJ.float().mean(2), misled_HI


def _misled(q_nHd: Tensor, k_nHd: Tensor, pattern: SparsePattern, wanted_HIJ: Tensor) -> Tensor:
    """Return how far the scores of blocks are from what dense attention wants of them, [H, I].

    Of blocks that are there to choose: ``-sum_J wanted_J log softmax(score)_J``; the score of a
    mean counts for all keys of its span, as their sum would.  Blocks that no query wants much of
    do not count: else they are wanted more and more, and attention becomes even.
    """
    wanted_HIJ = wanted_HIJ.where(wanted_HIJ > LEAST_WANTED, 0.0)
    forced_HIJ = seen_blocks(q_nHd, k_nHd, replace(pattern, num_selected=0))
    score_HIJ = block_scores(q_nHd, k_nHd, pattern) * (pattern.pool * q_nHd.shape[2] ** -0.5)
    log_share_HIJ = score_HIJ.masked_fill(forced_HIJ, -1e9).log_softmax(dim=2)
    misled_HI: Tensor = -(wanted_HIJ * log_share_HIJ).masked_fill(forced_HIJ, 0.0).sum(2)
    return misled_HI
