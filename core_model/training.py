"""Training of one task on packed sequences: AdamW, one cycle, weight averaging, balance.

The caller brings a device-resident batch, a loss and row weights; the loop knows
nothing of the task.  Weights say how much traffic a sampled sequence stands for: they
scale the loss (by the caller) and the expert load (here), so that balance holds for
the traffic and not for the sample.

Legend: B sequences, L layers, E experts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core_model.balance import BalanceLoss, expert_load, move_bias, rebalance
from core_model.model import MoETransformer, StepOutput
from core_model.packing import RaggedBatch, take_sequences

Loss = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int, float], None]
CHUNK = 4096  # sequences of one forward pass outside training


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Hyper-parameters; chosen on validation folds, see docs/log.md.

    Args:
        epochs: Passes over the sampled sequences.
        batch_size: Sequences per step.
        peak_lr: Learning rate at the top of the cycle.
        weight_decay: On matrices only.
        average_from: Share of the run after which weights are averaged.
        average_decay: Decay of the weight average per step.
        bias_rate: Step of the selection bias per update, falling linearly to 0.
        balance_loss: Weight of the auxiliary loss that balances in the place of the bias, if any.
    """

    epochs: int = 5
    batch_size: int = 1024
    peak_lr: float = 2e-3
    weight_decay: float = 0.05
    average_from: float = 0.6
    average_decay: float = 0.99
    bias_rate: float = 0.02
    balance_loss: float = 0.0


@dataclass(frozen=True, slots=True)
class WeightedSample:
    """Sequences of a task, drawn unevenly from its traffic.

    Args:
        task: Name of the task.
        batch: The sequences, on the model's device.
        weights_B: How many sequences of the traffic each stands for, float32 [B].
    """

    task: str
    batch: RaggedBatch
    weights_B: Tensor


class WeightAverage:
    """Exponential average of a model's parameters, corrected for its short history."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters: list[Tensor] = list(model.parameters())
        self._sums = [torch.zeros_like(p) for p in self._parameters]
        self._decay = decay
        self._mass = 0.0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        torch._foreach_lerp_(self._sums, self._parameters, 1.0 - self._decay)
        self._mass = self._decay * self._mass + (1.0 - self._decay)

    @torch.no_grad()
    def install(self) -> None:
        """Put the average in the parameters' place."""
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            parameter.copy_(total / self._mass)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: matrices and kernels decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


@torch.no_grad()
def settle_norms(model: MoETransformer, task: str, batches: Iterable[RaggedBatch]) -> None:
    """Measure the statistics of batch norms anew: those of averaged weights are no average.

    Args:
        model: Ends in evaluation mode.
        task: Whose batches follow.
        batches: A few hundred sequences of the training data.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over what follows
    model.train()
    for batch in batches:
        model({task: batch})
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    model.eval()


def _optimizer(
    model: nn.Module, settings: TrainSettings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    groups = decay_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.peak_lr, total_steps=steps, pct_start=0.15
    )
    return optimizer, schedule


def weighted_load(step: StepOutput, weights_B: Tensor, num_experts: int) -> Tensor:
    """Return the expert load of a step with each token weighted as its sequence, [L, E]."""
    return expert_load(step.experts_LTK, num_experts, _token_weights(step, weights_B))


def _token_weights(step: StepOutput, weights_B: Tensor) -> Tensor:
    counts = (step.cu_tokens[1:] - step.cu_tokens[:-1]).long()
    return torch.repeat_interleave(weights_B, counts)


def _draws(
    sample: WeightedSample, settings: TrainSettings, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield the sequences of each step; what does not fill a step waits for the next epoch."""
    num = sample.batch.num_sequences
    for _ in range(settings.epochs):
        order = torch.randperm(num, generator=generator).to(sample.weights_B.device)
        yield from order.split(settings.batch_size)[: num // settings.batch_size]


def train_task(
    model: MoETransformer,
    sample: WeightedSample,
    loss: Loss,
    settings: TrainSettings,
    generator: torch.Generator,
    progress: Progress,
) -> None:
    """Train in place; the model ends with averaged weights, not yet rebalanced.

    Args:
        model: On the device of the sample.
        sample: At least ``settings.batch_size`` sequences.
        loss: (output columns [b, D_out], sequence indices [b]) -> scalar.
        settings: Hyper-parameters.
        generator: CPU generator; fixes the order of the sequences.
        progress: Called with (step, number of steps, loss) every 20 steps.

    Raises:
        ValueError: The sample does not fill one step.
    """
    if sample.batch.num_sequences < settings.batch_size:
        message = (
            f"training of {sample.task}: expected at least {settings.batch_size} sequences, "
            f"got {sample.batch.num_sequences}; bring more or make batch_size smaller"
        )
        raise ValueError(message)
    steps = settings.epochs * (sample.batch.num_sequences // settings.batch_size)
    optimizer, schedule = _optimizer(model, settings, steps)
    average = WeightAverage(model, settings.average_decay)
    model.train()
    with BalanceLoss(model, settings.balance_loss) as balance:
        for step, chosen in enumerate(_draws(sample, settings, generator)):
            output = model({sample.task: take_sequences(sample.batch, chosen)})
            value = loss(output.outputs[sample.task][0], chosen)
            weights_B = sample.weights_B[chosen]
            optimizer.zero_grad(set_to_none=True)
            (value + balance.take(_token_weights(output, weights_B))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if settings.balance_loss == 0.0:
                load_LE = weighted_load(output, weights_B, model.config.num_experts)
                move_bias(model, load_LE, settings.bias_rate * (1.0 - step / steps))
            if step >= settings.average_from * steps:
                average.update()
            if step % 20 == 0:
                progress(step, steps, float(value.detach()))
    average.install()
    model.eval()


@torch.no_grad()
def rebalance_task(model: MoETransformer, task: str, traffic: RaggedBatch) -> None:
    """Balance the experts on a sample of the traffic to be served, once training is over.

    Averaging the weights and sampling the training rows by hardness both shift the load.
    No label is needed.
    """
    model.eval()
    chosen = torch.arange(traffic.num_sequences, device=traffic.features.device)
    parts = chosen.split(CHUNK)
    rebalance(model, [model.adapters[task](take_sequences(traffic, part)) for part in parts])


@torch.no_grad()
def predict(model: MoETransformer, task: str, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """Return output columns of all sequences [B, D_out] and the expert load [L, E]."""
    model.eval()
    outputs, loads = [], []
    for start in range(0, batch.num_sequences, CHUNK):
        end = min(start + CHUNK, batch.num_sequences)
        chosen = torch.arange(start, end, device=batch.features.device)
        step = model({task: take_sequences(batch, chosen)})
        outputs.append(step.outputs[task][0])
        loads.append(expert_load(step.experts_LTK, model.config.num_experts))
    return torch.cat(outputs), torch.stack(loads).sum(dim=0)
