"""How evenly held-out tokens of a mix of tasks load the experts.

The mix: every task has the same share of the tokens, however many each has brought.

Legend: L layers, T tokens, K chosen experts, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apps.joint import Lesson
from core_model.balance import uniform_utilisation, utilisation
from core_model.config import MoEConfig
from core_model.model import MoETransformer
from core_model.training import device_of

MOST_TOKENS = 500_000  # of a task
STEP_TOKENS = 1200  # of a step of the mix, in pieces that follow one another in the task's stream
NUM_STEPS = 300


@torch.no_grad()
def routing_of(model: MoETransformer, lesson: Lesson) -> NDArray[np.uint8]:
    """Return the experts that held-out tokens of a task chose, [L, T, K]."""
    model.eval()
    found: list[Tensor] = []
    for batch in lesson.held_out(device_of(model)):
        found.append(model.encode_and_run({lesson.task: batch}).experts_LTK.to(torch.uint8).cpu())
        if sum(each.shape[1] for each in found) >= MOST_TOKENS:
            break
    chosen: NDArray[np.uint8] = torch.cat(found, dim=1).numpy()
    return chosen


@dataclass(frozen=True, slots=True)
class Mix:
    """Tokens of several tasks.

    Args:
        chosen: Their experts by task, [L, T, K].
        config: Of the model.
    """

    chosen: Mapping[str, NDArray[np.uint8]]
    config: MoEConfig

    def figures(self, seed: int) -> dict[str, Any]:
        """Return utilisation of the mix and of each task, and that of single steps."""
        shares = self.shares()
        mixed = torch.from_numpy(np.mean(list(shares.values()), axis=0))
        by_task = {task: utilisation(torch.from_numpy(share)) for task, share in shares.items()}
        level = utilisation(mixed)
        steps = self._steps(seed)
        return {
            "tokens": {task: int(each.shape[1]) for task, each in self.chosen.items()},
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
                self._piece * len(self.chosen), self.config.num_experts, self.config.num_chosen
            ),
            "shares": {task: share.round(5).tolist() for task, share in shares.items()},
        }

    def shares(self) -> dict[str, NDArray[np.float64]]:
        """Return the share of each task's choices that fell on each expert, [L, E]."""
        return {task: self._load(chosen) / chosen[0].size for task, chosen in self.chosen.items()}

    @property
    def _piece(self) -> int:
        """Tokens of each task in a step."""
        fewest: int = min(chosen.shape[1] for chosen in self.chosen.values())
        return min(STEP_TOKENS // len(self.chosen), fewest)

    def _steps(self, seed: int) -> list[float]:
        """Return the utilisation of single steps, averaged over layers."""
        rng, size, found = np.random.default_rng(seed), self._piece, []
        for _ in range(NUM_STEPS):
            load = np.zeros((self.config.num_moe_layers, self.config.num_experts))
            for chosen in self.chosen.values():
                start = rng.integers(0, chosen.shape[1] - size + 1)
                load += self._load(chosen[:, start : start + size])
            found.append(float(utilisation(torch.from_numpy(load)).mean()))
        return found

    def _load(self, chosen: NDArray[np.uint8]) -> NDArray[np.float64]:
        num = self.config.num_experts
        counted = [np.bincount(layer.ravel(), minlength=num) for layer in chosen]
        return np.stack(counted).astype(np.float64)
