"""How evenly held-out tokens of a mix of tasks load the experts.

The mix: every task has the same share of the tokens, however many each has brought.
Tokens of a task are grouped by what its adapter made of them, to see what experts choose by.

Legend: L layers, T tokens, K chosen experts, E experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from apps.joint import Lesson
from core_model.balance import uniform_utilisation, utilisation
from core_model.config import MoEConfig
from core_model.model import MoETransformer
from core_model.training import device_of

MOST_TOKENS = 1_000_000  # of a task
STEP_TOKENS = 1200  # of a step of the mix, in pieces that follow one another in the task's stream
NUM_STEPS = 300
NUM_KINDS = 3  # of each task's tokens
KINDS_FROM = 20_000  # tokens that the kinds are found on


class Routed(NamedTuple):
    """Tokens of a task.

    Args:
        chosen: Their experts, [L, T, K].
        kind: Which of ``NUM_KINDS`` groups of like tokens each belongs to, [T].
    """

    chosen: NDArray[np.uint8]
    kind: NDArray[np.uint8]


@torch.no_grad()
def routing_of(model: MoETransformer, lesson: Lesson) -> Routed:
    """Return what held-out tokens of a task chose, and their kinds."""
    model.eval()
    found: list[Tensor] = []
    tokens: list[Tensor] = []
    for batch in lesson.held_out(device_of(model)):
        step = model.encode_and_run({lesson.task: batch})
        found.append(step.experts_LTK.to(torch.uint8).cpu())
        tokens.append(step.encoded[lesson.task].tokens_TD.half().cpu())
        if sum(each.shape[1] for each in found) >= MOST_TOKENS:
            break
    return Routed(torch.cat(found, dim=1).numpy(), kinds_of(torch.cat(tokens).numpy()))


def kinds_of(tokens_TD: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Return the group of each token by k-means, the largest group first, [T]."""
    seen = np.random.default_rng(0).permutation(len(tokens_TD))[:KINDS_FROM]
    groups = MiniBatchKMeans(NUM_KINDS, random_state=0, n_init=3)
    groups.fit(tokens_TD[seen].astype(np.float32))
    parts = np.array_split(tokens_TD, max(1, len(tokens_TD) // KINDS_FROM))
    found = np.concatenate([groups.predict(part.astype(np.float32)) for part in parts])
    rank = np.argsort(np.argsort(-np.bincount(found, minlength=NUM_KINDS), kind="stable"))
    kinds: NDArray[np.uint8] = rank[found].astype(np.uint8)
    return kinds


@dataclass(frozen=True, slots=True)
class Mix:
    """Tokens of several tasks.

    Args:
        routed: By task.
        config: Of the model.
    """

    routed: Mapping[str, Routed]
    config: MoEConfig

    def figures(self, seed: int) -> dict[str, Any]:
        """Return utilisation of the mix and of each task, and that of single steps."""
        shares = self.shares()
        mixed = torch.from_numpy(np.mean(list(shares.values()), axis=0))
        by_task = {task: utilisation(torch.from_numpy(share)) for task, share in shares.items()}
        level = utilisation(mixed)
        steps = self._steps(seed)
        return {
            "tokens": {task: each.kind.size for task, each in self.routed.items()},
            "utilisation": level.tolist(),
            "mean": float(level.mean()),
            "worst_layer": float(level.min()),
            "by_task": {
                task: {
                    "mean": float(each.mean()),
                    "worst_layer": float(each.min()),
                    "dead": int((shares[task] == 0).sum()),
                }
                for task, each in by_task.items()
            },
            "step": {"mean": float(np.mean(steps)), "p5": float(np.quantile(steps, 0.05))},
            "step_of_random_routing": uniform_utilisation(
                self._piece * len(self.routed), self.config.num_experts, self.config.num_chosen
            ),
            "shares": {
                name: share.round(5).tolist()
                for task, share in shares.items()
                for name, share in ((task, share), *self._shares_of_kinds(task))
            },
        }

    def shares(self) -> dict[str, NDArray[np.float64]]:
        """Return the share of each task's choices that fell on each expert, [L, E]."""
        return {task: self._share(each.chosen) for task, each in self.routed.items()}

    def _shares_of_kinds(self, task: str) -> Iterator[tuple[str, NDArray[np.float64]]]:
        chosen, kind = self.routed[task]
        for number in np.unique(kind).tolist():
            yield f"{task}, kind {number + 1}", self._share(chosen[:, kind == number])

    def _share(self, chosen: NDArray[np.uint8]) -> NDArray[np.float64]:
        share: NDArray[np.float64] = self._load(chosen) / chosen[0].size
        return share

    @property
    def _piece(self) -> int:
        """Tokens of each task in a step."""
        fewest = min(each.kind.size for each in self.routed.values())
        return min(STEP_TOKENS // len(self.routed), fewest)

    def _steps(self, seed: int) -> list[float]:
        """Return the utilisation of single steps, averaged over layers."""
        rng, size, found = np.random.default_rng(seed), self._piece, []
        for _ in range(NUM_STEPS):
            load = np.zeros((self.config.num_moe_layers, self.config.num_experts))
            for chosen, kind in self.routed.values():
                start = rng.integers(0, kind.size - size + 1)
                load += self._load(chosen[:, start : start + size])
            found.append(float(utilisation(torch.from_numpy(load)).mean()))
        return found

    def _load(self, chosen: NDArray[np.uint8]) -> NDArray[np.float64]:
        num = self.config.num_experts
        counted = [np.bincount(layer.ravel(), minlength=num) for layer in chosen]
        return np.stack(counted).astype(np.float64)
