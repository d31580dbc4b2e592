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
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.block_sparse import SparsePattern, block_sparse_attention, seen_blocks
from kernels.dispatch import Impl, needs_grad

MOST_SCORES = 1 << 28  # of queries and keys at once: 1 GiB
USUAL_LENGTH = 128  # at which scores are as they are


class Setup(NamedTuple):
    """Sizes of the task and of the model.

    Args:
        num_pairs: Keys of a sequence, all asked for.
        num_names: Different keys, and different values.
        num_fillers: Different tokens of the filler.
        stages: Length and names of each stage of training; the next begins when this is learnt.
        native_lengths: Positions of a sequence while the patterns themselves are trained, each for
            an equal part of that time.
        native_selected: Blocks that are chosen there, one for each pair: all queries choose together.
        tokens: Of a training step.
        lengths: Positions in the evaluation.
        tests: Sequences of each length in the evaluation.
        width: Of the model.
        num_heads: Of each layer.
        num_layers: Of the model.
        rate: Peak of the learning rate.
        sparse: Window and chosen blocks; the rest is dropped.
        selected_and_pooled: The same; the rest is pooled.
        pooled: Window, and pooled rows instead of all other keys.
    """

    num_pairs: int
    num_names: int
    num_fillers: int
    stages: tuple[tuple[int, int], ...]
    native_lengths: tuple[int, ...]
    native_selected: int
    tokens: int
    lengths: tuple[int, ...]
    tests: int
    width: int
    num_heads: int
    num_layers: int
    rate: float
    sparse: SparsePattern
    selected_and_pooled: SparsePattern
    pooled: SparsePattern

    def patterns(self) -> dict[str, SparsePattern | None]:
        """Return what is evaluated."""
        return {
            "dense": None,
            "block_sparse": self.sparse,
            "selected_and_pooled": self.selected_and_pooled,
            "pooled": self.pooled,
        }


GPU = Setup(
    num_pairs=8,
    num_names=64,
    num_fillers=32,
    stages=((64, 16), (128, 32), (256, 64), (512, 64), (1024, 64), (2048, 64)),
    native_lengths=(2048, 4096),
    native_selected=8,
    tokens=8192,
    lengths=(4096, 8192, 16384, 32768),
    tests=32,
    width=256,
    num_heads=4,
    num_layers=2,
    rate=2e-3,
    sparse=SparsePattern(num_selected=32, window=256),
    selected_and_pooled=SparsePattern(num_selected=32, window=256, far="pooled"),
    pooled=SparsePattern(num_selected=0, window=256, far="pooled", pool=8),
)
CPU = Setup(
    num_pairs=8,
    num_names=32,
    num_fillers=8,
    stages=((64, 16), (128, 32), (256, 32)),
    native_lengths=(256, 512),
    native_selected=8,
    tokens=2048,
    lengths=(256, 512, 1024),
    tests=16,
    width=64,
    num_heads=2,
    num_layers=2,
    rate=3e-3,
    sparse=SparsePattern(8, 16, 8, "dropped", 16, 8, 2),
    selected_and_pooled=SparsePattern(8, 16, 8, "pooled", 16, 8, 2),
    pooled=SparsePattern(0, 16, 8, "pooled", 16, 8, 8),
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
    """

    mass: Tensor
    best: Tensor
    keys: Tensor


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
    mass, best = [], []
    each = pattern.query_block
    rows = each * max(1, MOST_SCORES // (each * k_nHd.shape[0] * k_nHd.shape[1]))
    for first, q_QHd in zip(range(0, len(q_nHd), rows), q_nHd.split(rows), strict=True):
        score_HQK = torch.einsum("qhd,khd->hqk", q_QHd, k_nHd) * q_nHd.shape[2] ** -0.5
        weight_HQK = functional.pad(score_HQK.softmax(dim=2), (0, -len(k_nHd) % pattern.key_block))
        mass_HQJ = weight_HQK.unflatten(2, (-1, pattern.key_block)).sum(3)
        block_Q = torch.arange(first, first + len(q_QHd), device=q_nHd.device) // each
        mass.append((mass_HQJ * seen_HIJ[:, block_Q]).sum(2))
        best += [part.mean(1) for part in mass_HQJ.detach().split(each, dim=1)]
    sorted_HIJ = torch.stack(best, dim=1).sort(dim=2, descending=True).values
    last_HI1 = seen_HIJ.sum(2, keepdim=True) - 1
    best_HI = sorted_HIJ.cumsum(2).gather(2, last_HI1)[:, :, 0]
    return torch.cat(mass, dim=1), best_HI, seen_HIJ.float().mean(2)
