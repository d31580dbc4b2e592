"""Training on packed sequences that lie on the device: samples in epochs, balance, answers.

The caller brings a batch, a loss and row weights; the loop (``core_model.joint``) knows
nothing of the task.  Weights say how much traffic a sampled sequence stands for: they
scale the loss (by the caller) and the expert load (by the loop), so that balance holds for
the traffic and not for the sample.

Legend: B sequences, L layers, E experts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from core_model.balance import expert_load, rebalance
from core_model.joint import Draw, LoopSettings, epochs_of, train
from core_model.model import MoETransformer
from core_model.packing import Encoded, RaggedBatch, take_sequences

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


@torch.no_grad()
def settle_norms(model: MoETransformer, task: str, batches: Iterable[RaggedBatch]) -> None:
    """Measure the statistics of batch norms anew: those of averaged weights are no average.

    Args:
        model: Ends in evaluation mode.
        task: Whose batches follow.
        batches: A few hundred sequences of the training data.
    """
    own = nn.ModuleList([model.adapters[task], model.heads[task]])
    norms = [module for module in own.modules() if isinstance(module, nn.BatchNorm3d)]
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


@dataclass(frozen=True, slots=True)
class SampleSource:
    """Draws of a sample, in epochs (see ``core_model.joint.Source``).

    Args:
        sample: At least ``batch_size`` sequences.
        loss: (output columns [b, D_out], sequence indices [b]) -> scalar.
        batch_size: Sequences per step.
        seed: Of their order.
        peak_lr: As of ``Source``; weight_decay, weight: likewise.
    """

    sample: WeightedSample
    loss: Loss
    batch_size: int
    seed: int
    peak_lr: float
    weight_decay: float
    weight: float = 1.0

    @property
    def task(self) -> str:
        """Of the sample."""
        return self.sample.task

    def draws(self, start: int) -> Iterator[Draw]:
        """Yield what the steps from ``start`` on see."""
        weights_B, batch = self.sample.weights_B, self.sample.batch
        num = batch.num_sequences
        for chosen in epochs_of(num, self.batch_size, self.seed, start, weights_B.device):
            loss = partial(_loss_of_outputs, self.loss, chosen)
            yield Draw(take_sequences(batch, chosen), weights_B[chosen], loss)


def _loss_of_outputs(
    loss: Loss, chosen: Tensor, head: nn.Module, tokens_TD: Tensor, encoded: Encoded
) -> Tensor:
    return loss(head(tokens_TD, encoded)[0], chosen)


def train_task(
    model: MoETransformer,
    sample: WeightedSample,
    loss: Loss,
    settings: TrainSettings,
    seed: int,
    progress: Progress,
) -> None:
    """Train in place; the model ends with averaged weights, not yet rebalanced.

    Args:
        model: On the device of the sample.
        sample: At least ``settings.batch_size`` sequences.
        loss: (output columns [b, D_out], sequence indices [b]) -> scalar.
        settings: Hyper-parameters.
        seed: Of the order of the sequences.
        progress: Called with (step, number of steps, loss) every 20 steps.

    Raises:
        ValueError: The sample does not fill one step.
    """
    num, size = sample.batch.num_sequences, settings.batch_size
    if num < size:
        message = f"training of {sample.task}: expected at least {size} sequences, got {num}"
        raise ValueError(message + "; bring more or make batch_size smaller")
    source = SampleSource(sample, loss, size, seed, settings.peak_lr, settings.weight_decay)
    loop = LoopSettings(
        steps=settings.epochs * (num // size),
        average_from=settings.average_from,
        average_decay=settings.average_decay,
        bias_rate=settings.bias_rate,
        balance_loss=settings.balance_loss,
    )
    train(model, [source], loop, lambda step, steps, said: progress(step, steps, said[sample.task]))


def device_of(model: nn.Module) -> str:
    """Return where a model lies."""
    return str(next(model.parameters()).device)


def in_parts(batch: RaggedBatch) -> Iterator[RaggedBatch]:
    """Yield a batch in pieces of ``CHUNK`` sequences."""
    chosen = torch.arange(batch.num_sequences, device=batch.features.device)
    return (take_sequences(batch, part) for part in chosen.split(CHUNK))


@torch.no_grad()
def rebalance_task(model: MoETransformer, task: str, traffic: RaggedBatch) -> None:
    """Balance the experts on a sample of the traffic to be served, once training is over.

    Averaging the weights and sampling the training rows by hardness both shift the load.
    No label is needed.
    """
    model.eval()
    rebalance(model, task, [model.adapters[task](part) for part in in_parts(traffic)])


@torch.no_grad()
def predict(model: MoETransformer, task: str, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """Return output columns of all sequences [B, D_out] and the expert load [L, E]."""
    model.eval()
    outputs, loads = [], []
    for part in in_parts(batch):
        step = model({task: part})
        outputs.append(step.outputs[task][0])
        loads.append(expert_load(step.experts_LTK, model.config.num_experts))
    return torch.cat(outputs), torch.stack(loads).sum(dim=0)
