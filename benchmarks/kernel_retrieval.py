"""Does attention over chosen blocks find what dense attention finds?

A small transformer learns associative recall (``kernel_retrieval_model``) with dense attention, on
sequences that grow, and with names that become more, whenever the last ones are learnt.  Then two
copies of it learn one pattern each, in turns with steps of dense attention, as models would be
that are made for it:

* chosen blocks.  To the loss of dense steps are added ``-log(mass on the chosen blocks)``, the
  divergence of dense attention from what is left of it when the other blocks are dropped, and the
  cross-entropy of the scores that blocks are chosen by; the choice itself has no gradient.
* pooled keys and values, in place of all beyond the window.

They learn with small blocks on short sequences, and are evaluated with these on longer ones, and on
long ones with the blocks of the kernels.

Figures, for each length: accuracy of dense attention and of the pattern with the same weights.  Of
chosen blocks also: share of the dense attention's mass on attended blocks, over all rows, heads
and layers, and over the rows that answer alone; that mass over the mass that the best choice of as
many blocks would have; share of keys attended to.

    python -m benchmarks.kernel_retrieval --seconds 1200 --json FILE
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.kernel_retrieval_model import (
    SETUP,
    Batch,
    Covered,
    Recaller,
    Setup,
    covered,
    draw,
)
from benchmarks.kernel_timing import is_gpu
from kernels.block_sparse import SparsePattern

WARM_STEPS = 100
REPORT_S = 5.0
DENSE_SHARE = 0.5  # of the time, at most
LEARNT = 0.95  # right, when a stage ends
MEMORY = 0.8  # of the running share of right answers
MASS_WEIGHT = 1.0
CHOICE_WEIGHT = 0.3
LEAST_MASS = 1e-6


class Trainer:
    """A model in training, and what is said of it.

    Args:
        setup: Sizes.
        device: Where.
        seed: Of weights and sequences.
        seconds: Of all training.
    """

    def __init__(self, setup: Setup, device: str, seed: int, seconds: float) -> None:
        torch.manual_seed(seed)
        self.setup, self.device, self.seconds = setup, device, seconds
        self.generator = torch.Generator(device).manual_seed(seed)
        self.model = Recaller(setup).to(device)
        self.spent_s, self.reported_s, self.loss = 0.0, 0.0, math.nan
        self._begin()

    def learn_dense(self) -> None:
        """Train with dense attention, stage by stage."""
        for length, num_names in self.setup.stages:
            right = 0.0
            while right < LEARNT and self.spent_s < DENSE_SHARE * self.seconds:
                began_s = time.monotonic()
                batch = self._draw(length, num_names)
                with self._autocast():
                    logits = self.model(batch, None)
                right = MEMORY * right + (1 - MEMORY) * _right(logits, batch)
                self._update(_loss(logits, batch), self.setup.rate, began_s)
                self._report("dense", length, right)
            self._report("dense", length, right, now=True)

    def learn_native(self, part: str, seconds: float) -> None:
        """Train with a pattern as well, for so long; the rate falls to 0."""
        setup, first_s = self.setup, self.spent_s
        native = setup.native[part]
        self._begin()
        while self.spent_s < first_s + seconds:
            began_s = time.monotonic()
            progress = (self.spent_s - first_s) / seconds
            length = setup.native_lengths[int(progress * len(setup.native_lengths))]
            batch = self._draw(length, setup.num_names)
            is_dense = self.step % 2 == 0
            with self._autocast():
                logits = self.model(batch, None if is_dense else native)
                loss = _loss(logits, batch)
                if is_dense and native.num_selected:
                    found = covered(self.model, batch, native)
                    loss = loss - MASS_WEIGHT * found.mass.clamp(min=LEAST_MASS).log().mean()
                    loss = loss + CHOICE_WEIGHT * found.misled.mean()
            rate = setup.rate * 0.5 * (1 + math.cos(math.pi * progress))
            self._update(loss, rate, began_s)
            self._report("dense" if is_dense else part, length, _right(logits, batch))

    def _begin(self) -> None:
        self.step = 0
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.setup.rate, weight_decay=0.01
        )

    def _draw(self, length: int, num_names: int) -> Batch:
        count = max(1, self.setup.tokens // length)
        return draw(self.setup, length, num_names, count, self.generator)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=is_gpu(self.device))

    def _update(self, loss: Tensor, rate: float, began_s: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.step + 1) / WARM_STEPS)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.loss = float(loss.detach())  # waits for the device
        self.spent_s += time.monotonic() - began_s

    def _report(self, part: str, length: int, right: float, *, now: bool = False) -> None:
        if now or self.spent_s - self.reported_s > REPORT_S:
            self.reported_s = self.spent_s
            figures = f"loss {self.loss:.4f}, right {right:.3f}"
            _say(f"{self.spent_s:.0f} s, step {self.step}, {part}, length {length}: {figures}")


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), batch.answers.flatten())


def _right(logits: Tensor, batch: Batch) -> float:
    return float((logits.argmax(2) == batch.answers).float().mean())


@torch.no_grad()
def evaluate(
    setup: Setup, model: Recaller, device: str, pattern: SparsePattern, length: int, seed: int
) -> dict[str, Any]:
    """Return accuracies at a length, and the shares of mass that were attended to."""
    generator = torch.Generator(device).manual_seed(seed)
    right = {"dense": 0.0, "pattern": 0.0}
    mass = dict.fromkeys(("all", "answers", "of_best", "keys"), 0.0)
    for _ in range(setup.tests):
        batch = draw(setup, length, setup.num_names, 1, generator)
        with torch.autocast(device, torch.bfloat16, enabled=is_gpu(device)):
            right["dense"] += _right(model(batch, None), batch) / setup.tests
            right["pattern"] += _right(model(batch, pattern), batch) / setup.tests
            if pattern.num_selected:
                shares = covered(model, batch, pattern)
                for name, share in zip(mass, _shares(shares, setup.num_pairs), strict=True):
                    mass[name] += share / setup.tests
    figures = {
        "length": length,
        "pattern": str(pattern),
        "accuracy": _rounded(right),
        "of_dense": round(right["pattern"] / max(right["dense"], 1e-9), 4),
    }
    return {**figures, "mass": _rounded(mass)} if pattern.num_selected else figures


def _shares(found: Covered, num_queries: int) -> list[float]:
    mass = found.mass.mean()
    means = (
        mass,
        found.mass[:, :, -num_queries:].mean(),
        mass / found.best.mean(),
        found.keys.mean(),
    )
    return [float(each) for each in means]


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(figure, 4) for name, figure in figures.items()}


def run(setup: Setup, device: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train and evaluate; return the figures."""
    trainer = Trainer(setup, device, seed, seconds)
    trainer.learn_dense()
    figures: dict[str, Any] = {"device": device, "dense_seconds": round(trainer.spent_s, 1)}
    learnt = copy.deepcopy(trainer.model.state_dict())
    each_s = (seconds - trainer.spent_s) / len(setup.native)
    for part in setup.native:
        trainer.model.load_state_dict(learnt)
        trainer.learn_native(part, each_s)
        rows = []
        for pattern, length in _evaluations(setup, part, device):
            rows.append(evaluate(setup, trainer.model, device, pattern, length, seed + 1))
            _say(json.dumps({"trained": part, **rows[-1]}))
        figures[part] = {"steps": trainer.step, "seconds": round(each_s, 1), "rows": rows}
    return figures


def _evaluations(setup: Setup, part: str, device: str) -> list[tuple[SparsePattern, int]]:
    long = setup.long_lengths if is_gpu(device) else setup.long_lengths[:1]
    as_trained = [(setup.native[part], length) for length in setup.lengths]
    return as_trained + [(setup.usual[part], length) for length in long]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, print; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="kernel_retrieval", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1200.0, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    figures = run(SETUP, args.device, args.seed, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _say(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
