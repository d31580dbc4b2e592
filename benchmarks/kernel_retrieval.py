"""Does attention over chosen blocks find what dense attention finds?

A small transformer learns associative recall with dense attention; then the same weights answer
with the blocks that ``kernels.block_sparse`` chooses, and with far keys pooled.

A sequence holds pairs of tokens (key, value) at random places among filler, every key once, and
at its end queries: some of the keys again, in any order.  At the place of a query the model must
name the value.  The window covers a small part of the sequence, so that a query finds its pair
only through the choice.

Figures, for each length: accuracy dense, block-sparse, pooled; share of the dense attention's
mass that lies on blocks that were attended to, over all queries, heads and layers, and over the
rows that answer alone; share of keys attended to.

    python -m benchmarks.kernel_retrieval --device cuda --seconds 90 --json FILE
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.kernel_timing import is_gpu
from kernels.attention import FULL, varlen_attention
from kernels.block_sparse import SparsePattern, block_sparse_attention, seen_blocks

WARM_STEPS = 100
REPORT_S = 5.0


class Setup(NamedTuple):
    """Sizes of the task and of the model.

    Args:
        num_pairs: Keys of a sequence.
        num_queries: Of them asked for.
        num_names: Different keys, and different values.
        train_lengths: Positions of a sequence in training, drawn anew at each step.
        lengths: Positions in the evaluation.
        tokens: Of a training step.
        tests: Sequences of each length in the evaluation.
        width: Of the model.
        num_heads: Of each layer.
        num_layers: Of the model.
        rate: Peak of the learning rate.
        patterns: What is evaluated beside dense attention.
    """

    num_pairs: int
    num_queries: int
    num_names: int
    train_lengths: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: int
    tests: int
    width: int
    num_heads: int
    num_layers: int
    rate: float
    patterns: dict[str, SparsePattern]


GPU = Setup(
    num_pairs=64,
    num_queries=16,
    num_names=256,
    train_lengths=(256, 512, 1024, 2048),
    lengths=(2048, 8192, 16384),
    tokens=32768,
    tests=16,
    width=256,
    num_heads=4,
    num_layers=2,
    rate=1e-3,
    patterns={
        "block_sparse": SparsePattern(num_selected=32, window=256, num_global=64),
        "pooled": SparsePattern(num_selected=32, window=256, num_global=64, far="pooled"),
        "window_and_pooled": SparsePattern(num_selected=0, window=256, num_global=64, far="pooled"),
    },
)
CPU = Setup(
    num_pairs=8,
    num_queries=4,
    num_names=16,
    train_lengths=(64, 128),
    lengths=(128, 256, 512),
    tokens=2048,
    tests=16,
    width=64,
    num_heads=2,
    num_layers=2,
    rate=3e-3,
    patterns={
        "block_sparse": SparsePattern(8, 16, 8, "dropped", 16, 8, 2),
        "pooled": SparsePattern(8, 16, 8, "pooled", 16, 8, 2),
        "window_and_pooled": SparsePattern(0, 16, 8, "pooled", 16, 8, 2),
    },
)


class Batch(NamedTuple):
    """Packed sequences of equal length: tokens [T], offsets, places of queries and answers."""

    tokens: Tensor
    cu_seqlens: Tensor
    places: Tensor
    answers: Tensor


def draw(setup: Setup, length: int, count: int, generator: torch.Generator) -> Batch:
    """Return so many sequences; keys are tokens from 1, values follow them, 0 is filler."""
    device, names = generator.device, setup.num_names
    scores = torch.rand(count, names, generator=generator, device=device)
    keys = scores.argsort(dim=1)[:, : setup.num_pairs]
    values = torch.randint(names, keys.shape, generator=generator, device=device)
    body = (length - setup.num_queries) // 2
    where = torch.rand(count, body, generator=generator, device=device).argsort(dim=1)
    where = 2 * where[:, : setup.num_pairs]
    tokens = torch.zeros(count, length, dtype=torch.int64, device=device)
    tokens.scatter_(1, where, keys + 1)
    tokens.scatter_(1, where + 1, values + 1 + names)
    asked = torch.rand(keys.shape, generator=generator, device=device).argsort(dim=1)
    asked = asked[:, : setup.num_queries]
    tokens[:, length - setup.num_queries :] = keys.gather(1, asked) + 1
    place = torch.arange(length - setup.num_queries, length, device=device)
    start = torch.arange(count, device=device) * length
    cu_seqlens = torch.arange(count + 1, device=device, dtype=torch.int32) * length
    places = (start.unsqueeze(1) + place).flatten()
    return Batch(tokens.flatten(), cu_seqlens, places, values.gather(1, asked).flatten())


class Layer(nn.Module):
    """Attention, then a feed-forward; keys and values also see the token before their own.

    The short convolution over neighbours lets one layer bind a key to the value behind it
    (Arora et al. 2023, arXiv:2312.04927).
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        d = setup.width
        self.num_heads = setup.num_heads
        self.norms = nn.ModuleList([nn.RMSNorm(d), nn.RMSNorm(d)])
        self.mix = nn.Parameter(torch.tensor([0.1, 1.0, 0.1]).repeat(d, 1).unsqueeze(1))
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d, bias=False)

    def project(self, x_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, [T, H, d]."""
        count = batch.cu_seqlens.numel() - 1
        x_BDn = self.norms[0](x_TD).unflatten(0, (count, -1)).transpose(1, 2)
        mix = self.mix.to(x_BDn.dtype)
        x_BDn = functional.conv1d(x_BDn, mix, padding=1, groups=x_BDn.shape[1])
        qkv = self.qkv(x_BDn.transpose(1, 2).flatten(0, 1)).unflatten(1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(1)
        return q, k, v

    def forward(self, x_TD: Tensor, batch: Batch, pattern: SparsePattern | None) -> Tensor:
        """Return the stream behind the layer."""
        q, k, v = self.project(x_TD, batch)
        if pattern is None:
            mixed = self._dense(q, k, v, batch)
        else:
            mixed = block_sparse_attention(q, k, v, batch.cu_seqlens, pattern)
        x_TD = x_TD + self.out(mixed.flatten(1))
        out_TD: Tensor = x_TD + self.down(functional.gelu(self.up(self.norms[1](x_TD))))
        return out_TD

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        if not torch.is_grad_enabled():
            return varlen_attention(q, k, v, batch.cu_seqlens, FULL)
        count = batch.cu_seqlens.numel() - 1
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
        mixed: Tensor = functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(0, 1)


class Recaller(nn.Module):
    """Tokens in, a value named at the places of queries."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * setup.num_names + 1, setup.width)
        self.layers = nn.ModuleList([Layer(setup) for _ in range(setup.num_layers)])
        self.norm = nn.RMSNorm(setup.width)
        self.head = nn.Linear(setup.width, setup.num_names, bias=False)

    def forward(self, batch: Batch, pattern: SparsePattern | None) -> Tensor:
        """Return logits of the values at the places, [queries, names]."""
        x_TD = self.embedding(batch.tokens)
        for layer in self.layers:
            x_TD = layer(x_TD, batch, pattern)
        logits: Tensor = self.head(self.norm(x_TD)[batch.places])
        return logits


def train(setup: Setup, device: str, seconds: float, seed: int) -> tuple[Recaller, dict[str, Any]]:
    """Return a model trained with dense attention for at most so long."""
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    model = Recaller(setup).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.rate, weight_decay=0.01)
    began_s, step, loss = time.monotonic(), 0, torch.zeros(())
    reported_s, right = began_s, 0.0
    while (spent_s := time.monotonic() - began_s) < seconds:
        progress = spent_s / seconds
        warm = min(1.0, (step + 1) / WARM_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = setup.rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
        length = setup.train_lengths[step % len(setup.train_lengths)]
        batch = draw(setup, length, max(1, setup.tokens // length), generator)
        with torch.autocast(device, torch.bfloat16, enabled=is_gpu(device)):
            logits = model(batch, None)
            loss = functional.cross_entropy(logits.float(), batch.answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - reported_s > REPORT_S:
            reported_s = time.monotonic()
            right = float((logits.argmax(1) == batch.answers).float().mean())
            sys.stdout.write(f"step {step}: loss {float(loss):.4f}, right {right:.3f}\n")
            sys.stdout.flush()
    return model.eval(), {"steps": step, "loss": float(loss), "seconds": round(spent_s, 1)}


@torch.no_grad()
def evaluate(setup: Setup, model: Recaller, device: str, length: int, seed: int) -> dict[str, Any]:
    """Return accuracies at a length, and the shares of mass that were attended to."""
    generator = torch.Generator(device).manual_seed(seed)
    hits: dict[str, int] = dict.fromkeys(("dense", *setup.patterns), 0)
    mass: dict[str, float] = dict.fromkeys(("all", "answers", "keys"), 0.0)
    asked = 0
    for _ in range(setup.tests):
        batch = draw(setup, length, 1, generator)
        asked += len(batch.answers)
        with torch.autocast(device, torch.bfloat16, enabled=is_gpu(device)):
            for name in hits:
                logits = model(batch, setup.patterns.get(name))
                hits[name] += int((logits.argmax(1) == batch.answers).sum())
            shares = attended_mass(model, batch, setup.patterns["block_sparse"])
        for name, share in zip(mass, shares, strict=True):
            mass[name] += share / setup.tests
    accuracy = {name: round(count / asked, 4) for name, count in hits.items()}
    of_dense = {name: round(hits[name] / max(1, hits["dense"]), 4) for name in setup.patterns}
    covered = {name: round(share, 4) for name, share in mass.items()}
    return {"length": length, "accuracy": accuracy, "of_dense": of_dense, "mass": covered}


def attended_mass(model: Recaller, batch: Batch, pattern: SparsePattern) -> list[float]:
    """Return the share of dense attention on attended keys, and the share of keys attended to.

    The former of all rows, and of those that answer.
    """
    shares: list[list[Tensor]] = [[], [], []]
    x_TD = model.embedding(batch.tokens)
    for layer in model.layers:
        assert isinstance(layer, Layer)  # noqa: S101 - a list of modules has no types
        q, k, _ = layer.project(x_TD, batch)
        seen_HIJ = seen_blocks(q, k, pattern)
        share_Hn = _mass_of(q, k, seen_HIJ, pattern)
        figures = (share_Hn.mean(), share_Hn[:, batch.places].mean(), seen_HIJ.float().mean())
        for each, figure in zip(shares, figures, strict=True):
            each.append(figure)
        x_TD = layer(x_TD, batch, None)
    return [float(torch.stack(each).mean()) for each in shares]


def _mass_of(q_nHd: Tensor, k_nHd: Tensor, seen_HIJ: Tensor, pattern: SparsePattern) -> Tensor:
    """Return the mass of each query on the keys its block attends to, [H, n]."""
    n = len(q_nHd)
    block_n = torch.arange(n, device=q_nHd.device) // pattern.key_block
    parts = []
    for i, q_QHd in enumerate(q_nHd.split(pattern.query_block)):
        score_HQK = torch.einsum("qhd,khd->hqk", q_QHd.float(), k_nHd.float())
        weight_HQK = (score_HQK * q_nHd.shape[2] ** -0.5).softmax(dim=2)
        parts.append((weight_HQK * seen_HIJ[:, i, None, :][:, :, block_n]).sum(2))
    return torch.cat(parts, dim=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, print; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="kernel_retrieval", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    setup = GPU if is_gpu(args.device) else CPU
    model, training = train(setup, args.device, args.seconds, args.seed)
    rows = []
    for length in setup.lengths:
        rows.append(evaluate(setup, model, args.device, length, args.seed + 1))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    figures = {"device": args.device, "training": training, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
