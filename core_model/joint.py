"""Training of one or more tasks in the same steps: one loop, whatever the tasks are.

A step holds sequences of every task, packed side by side as in service.  Losses of different
tasks have different units; so that none of them drowns another in the shared blocks, the
gradient that each task sends into them is scaled to the same running norm, times its weight
(the aim of Chen et al. 2018, arXiv:1711.02257, without a second backward pass), and scaled back
where it leaves them: an adapter, part of which feeds its head directly, sees the loss as it is.

What a step draws depends on its number alone: a run that was cut off goes on from its last
saved state and ends with the same weights.

Legend: B sequences, T tokens, D model, L layers, E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from core_model.balance import BalanceLoss, expert_load, move_bias
from core_model.model import MoETransformer, Step
from core_model.packing import Encoded, RaggedBatch

Progress = Callable[[int, int, Mapping[str, float]], None]
TaskLoss = Callable[[nn.Module, Tensor, Encoded], Tensor]
NORM_DECAY = 0.98  # of the running norm of a task's gradient, per step
SAY_EVERY, SAVE_EVERY = 20, 200  # steps


class Draw(NamedTuple):
    """What one step sees of one task.

    Args:
        batch: On the model's device.
        weights_B: How much traffic each sequence stands for, float32 [B].
        loss: (head, the task's tokens [T, D], what its adapter made) -> scalar.
    """

    batch: RaggedBatch
    weights_B: Tensor
    loss: TaskLoss


class Source(Protocol):
    """Endless draws of one task."""

    @property
    def task(self) -> str:
        """Name in the registry."""
        ...

    @property
    def peak_lr(self) -> float:
        """Learning rate of its adapter and head at the top of the cycle."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of their matrices."""
        ...

    @property
    def weight(self) -> float:
        """Of its pull on the shared blocks beside the other tasks'."""
        ...

    def draws(self, start: int) -> Iterator[Draw]:
        """Yield what the steps ``start``, ``start + 1``, ... see, each a function of its number."""
        ...


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Hyper-parameters of what the tasks share.

    Args:
        steps: Of the optimizer.
        peak_lr: Learning rate of the shared blocks at the top of the cycle.
        weight_decay: On their matrices.
        average_from: Share of the run after which weights are averaged.
        average_decay: Decay of the weight average per step.
        bias_rate: Step of the selection bias per update, falling linearly to 0.
        balance_loss: Weight of the auxiliary loss that balances in the place of the bias, if any.
    """

    steps: int
    peak_lr: float = 2e-3
    weight_decay: float = 0.05
    average_from: float = 0.6
    average_decay: float = 0.99
    bias_rate: float = 0.02
    balance_loss: float = 0.0


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

    def state_dict(self) -> dict[str, Any]:
        """Return what has been taken in."""
        return {"sums": self._sums, "mass": self._mass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        torch._foreach_copy_(self._sums, state["sums"])
        self._mass = state["mass"]


class _Pulls:
    """Scales what each task sends back through the blocks; of a single task, nothing."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._weights = {each.task: each.weight for each in sources} if len(sources) > 1 else {}
        self.norms: dict[str, Tensor] = {}

    def watch(self, task: str, before_TD: Tensor, after_TD: Tensor) -> None:
        """Scale the gradient of tokens behind the blocks once it comes, and back before them."""
        if task not in self._weights:
            return
        after_TD.register_hook(lambda gradient: self._scale(task, gradient))
        if before_TD.requires_grad:
            before_TD.register_hook(lambda gradient: gradient / self._pull(task))

    def _scale(self, task: str, gradient: Tensor) -> Tensor:
        norm = gradient.norm()
        last = self.norms.get(task, norm)
        self.norms[task] = last.lerp(norm, 1.0 - NORM_DECAY)
        return gradient * self._pull(task)

    def _pull(self, task: str) -> Tensor:
        return self._weights[task] / self.norms[task].clamp(min=1e-12)


class _Owned(NamedTuple):
    """Parameters that the same tasks train, and how."""

    parameters: list[nn.Parameter]
    peak_lr: float
    weight_decay: float


def decay_groups(
    parameters: Sequence[nn.Parameter], weight_decay: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return parameter groups for an optimizer: matrices and kernels decay, vectors do not."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return (
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    )


def _owners(
    model: MoETransformer, sources: Sequence[Source], settings: LoopSettings
) -> list[_Owned]:
    """Return the parameters by who trains them; all are one task's own if there is but one."""
    if len(sources) == 1:
        (only,) = sources
        return [_Owned(list(model.parameters()), only.peak_lr, only.weight_decay)]
    own = [
        _Owned(
            [*model.adapters[s.task].parameters(), *model.heads[s.task].parameters()],
            s.peak_lr,
            s.weight_decay,
        )
        for s in sources
    ]
    shared = [*model.blocks.parameters(), model.final_norm]
    return [_Owned(shared, settings.peak_lr, settings.weight_decay), *own]


class Training:
    """A run of the loop: model, optimizer, schedule and average, which are saved together.

    Args:
        model: On the device of the draws.
        sources: One per task.
        settings: Hyper-parameters.
    """

    def __init__(
        self, model: MoETransformer, sources: Sequence[Source], settings: LoopSettings
    ) -> None:
        self._model, self._sources, self._settings = model, sources, settings
        self._owners = _owners(model, sources, settings)
        groups = [
            {**group, "lr": each.peak_lr}
            for each in self._owners
            for group in decay_groups(each.parameters, each.weight_decay)
            if group["params"]
        ]
        self._optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), fused=model.final_norm.is_cuda or None
        )
        peaks = [group["lr"] for group in groups]
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, peaks, total_steps=settings.steps, pct_start=0.15
        )
        self._average = WeightAverage(model, settings.average_decay)
        self._pulls = _Pulls(sources)
        self._step = 0

    def run(self, progress: Progress, keep: Path | None) -> None:
        """Do the steps that are left; the model ends with averaged weights, in evaluation mode."""
        settings = self._settings
        self._model.train()
        draws = [source.draws(self._step) for source in self._sources]
        with BalanceLoss(self._model, settings.balance_loss) as balance:
            while self._step < settings.steps:
                losses = self._do([next(each) for each in draws], balance)
                if self._step % SAY_EVERY == 0:
                    said = {task: float(loss.detach()) for task, loss in losses.items()}
                    progress(self._step, settings.steps, said)
                self._step += 1
                if keep is not None and self._step % SAVE_EVERY == 0:
                    self.save(keep)
        self._average.install()
        self._model.eval()

    def _do(self, drawn: Sequence[Draw], balance: BalanceLoss) -> dict[str, Tensor]:
        """Do one step; return the tasks' losses."""
        model, settings = self._model, self._settings
        by_task = {s.task: draw for s, draw in zip(self._sources, drawn, strict=True)}
        step = model.encode_and_run({task: draw.batch for task, draw in by_task.items()})
        losses: dict[str, Tensor] = {}
        for task, draw in by_task.items():
            self._pulls.watch(task, step.encoded[task].tokens_TD, step.pieces[task])
            losses[task] = draw.loss(model.heads[task], step.pieces[task], step.encoded[task])
        weights_T = _token_weights(step, by_task)
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.stack(list(losses.values())).sum()
        (total + balance.take(weights_T)).backward()
        for each in self._owners:
            nn.utils.clip_grad_norm_(each.parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        done = self._step / settings.steps
        if settings.balance_loss == 0.0:
            self._balance(step, weights_T, settings.bias_rate * (1.0 - done))
        is_last = self._step == settings.steps - 1
        if is_last or self._step >= settings.average_from * settings.steps:
            self._average.update()
        return losses

    def _balance(self, step: Step, weights_T: Tensor, rate: float) -> None:
        """Move the selection biases of each task by the load of its own tokens."""
        sizes = [piece.shape[0] for piece in step.pieces.values()]
        parts = zip(step.experts_LTK.split(sizes, dim=1), weights_T.split(sizes), strict=True)
        for task, (experts_LTK, own_T) in zip(step.pieces, parts, strict=True):
            load_LE = expert_load(experts_LTK, self._model.config.num_experts, own_T)
            move_bias(self._model, task, load_LE, rate)

    def save(self, path: Path) -> None:
        """Write the state; it appears whole or not at all."""
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        state = {
            "what": self._what,
            "step": self._step,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "average": self._average.state_dict(),
            "norms": self._pulls.norms,
            "random": random,
        }
        partial = path.with_name(f"partial-{path.name}")
        torch.save(state, partial)
        partial.rename(path)

    def load(self, path: Path) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: It is of another run.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["what"] != self._what:
            message = f"{path}: expected the state of this run, got one of other settings; "
            raise ValueError(message + "take another work folder")
        device = next(self._model.parameters()).device
        self._step = state["step"]
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._average.load_state_dict(state["average"])
        self._pulls.norms = {task: norm.to(device) for task, norm in state["norms"].items()}
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random"]["cuda"])

    @property
    def _what(self) -> str:
        """What a run is about, in words: a state of one is no state of another."""
        sources = [(s.task, s.peak_lr, s.weight_decay, s.weight) for s in self._sources]
        return repr((self._model.config.to_dict(), sources, asdict(self._settings)))


def train(
    model: MoETransformer,
    sources: Sequence[Source],
    settings: LoopSettings,
    progress: Progress,
    keep: Path | None = None,
) -> None:
    """Train in place; the model ends with averaged weights, not yet rebalanced.

    Args:
        model: On the device of the draws; serves the sources' tasks.
        sources: One per task.  A single one trains every parameter at its own rate.
        settings: Hyper-parameters.
        progress: Called with (step, steps, loss of each task) every 20 steps.
        keep: File of the state; a run that finds it goes on from there.

    Raises:
        ValueError: ``keep`` holds the state of another run.
    """
    training = Training(model, sources, settings)
    if keep is not None and keep.exists():
        training.load(keep)
    training.run(progress, keep)


def _token_weights(step: Step, by_task: Mapping[str, Draw]) -> Tensor:
    """Return how much traffic each token stands for, every task the same in sum, [T]."""
    parts = []
    for task, draw in by_task.items():
        counts = step.encoded[task].cu_tokens.diff().long()
        weights_T = torch.repeat_interleave(draw.weights_B, counts)
        parts.append(weights_T / weights_T.sum())
    return torch.cat(parts)


def epochs_of(num: int, size: int, seed: int, start: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the members of each step from ``start`` on, in epochs without end.

    Args:
        num: Members; what does not fill a step of an epoch waits for the next one.
        size: Of a step.
        seed: Of the order.
        start: First step.
        device: Of the indices.

    Raises:
        ValueError: The members do not fill one step.
    """
    each = num // size
    if each == 0:
        message = f"expected at least {size} sequences, got {num}"
        raise ValueError(message + "; bring more or make batch_size smaller")
    generator = torch.Generator().manual_seed(seed)
    first = start
    while True:
        order = torch.randperm(num, generator=generator).to(device)
        yield from order.split(size)[min(first, each) : each]
        first = max(first - each, 0)
