"""Training of the forecast task: trees cross-fitted, sequence experts, gate and calibration.

Legend: N rows, C components, D columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apps.maintenance.chances import first_failure, hazard_probs
from apps.maintenance.fleet import Floats, Floats32, Ints
from apps.maintenance.inputs import LIFE_CAP_HOURS, Series
from apps.maintenance.intervals import conformal_margin
from apps.maintenance.protocol import labels, tune_caution
from apps.maintenance.training.trees import (
    Lives,
    ask_trees,
    cross_fit,
    fit_hazard_trees,
)
from core_model.config import PRESETS
from core_model.hazard import HazardHead, fit_gate, hazard_loss, pinball_loss
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.series import SeriesAdapter
from core_model.series_tasks import FORECAST, HORIZONS, NUM_COMPONENTS, NUM_HAZARDS
from core_model.training import (
    Loss,
    TrainSettings,
    WeightedSample,
    predict,
    rebalance_task,
    train_task,
)

SETTINGS = TrainSettings(epochs=4, batch_size=512, peak_lr=2e-3, weight_decay=0.3)
LEAST_STEPS = 200  # of training, where rows are few
HOURS_WEIGHT = 0.1  # of the quantiles' loss beside the hazards'
CAUTIONS = tuple(np.geomspace(0.05, 2.0, 40).tolist())
FIRST_HOURS = FORECAST.outputs.index("log_hours_5")
FIRST_HAZARD = FORECAST.outputs.index("hazard_0")
FIRST_SEQUENCE = FORECAST.outputs.index("sequence_hazard_0")


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows ready for the model.

    Args:
        series: Their inputs.
        machine: Index of each row's machine [N].
        hours: To each component's next failure [N, C].
        observed: Hours for which each row was looked after [N].
        left: Hours to the machine's next failure up to the cap [N], NaN where not known.
        weight: How many rows of the traffic each stands for [N].
    """

    series: Series
    machine: Ints
    hours: Ints
    observed: Ints
    left: Floats32
    weight: Floats32

    @property
    def lives(self) -> Lives:
        """What the trees learn from."""
        return Lives(self.series.context, self.hours, self.observed, self.weight)

    def batch(self, tree: Floats32, device: str) -> RaggedBatch:
        """Return them as one packed batch with the trees' answers."""
        return to_batch(self.series, tree, device)

    def take(self, kept: NDArray[np.bool_]) -> "Examples":
        """Return the rows of a mask."""
        rows = np.flatnonzero(kept)
        return Examples(
            self.series.take(rows),
            self.machine[rows],
            self.hours[rows],
            self.observed[rows],
            self.left[rows],
            self.weight[rows],
        )

    def with_series(self, series: Series) -> "Examples":
        """Return the same rows with other inputs."""
        return replace(self, series=series)


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model is to be trained."""

    seed: int = 0
    device: str = "cpu"
    preset: str = "small"
    threads: int = 1
    label: str = "forecast"
    settings: TrainSettings = field(default_factory=lambda: SETTINGS)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is chosen on rows that were held out.

    Args:
        caution: Factor on the probability of no failure at each horizon.
        margin: Added on both sides of the interval of log(1 + hours left).
        gate: Logits of the gate [H, C].
    """

    caution: dict[int, float]
    margin: float
    gate: Floats32


class Answers(NamedTuple):
    """What a model says of rows.

    Args:
        hazard: Logits [N, H * C]; sequence: of the sequence experts alone.
        log_hours: Quantiles of log(1 + hours left) [N, 3].
    """

    hazard: Floats32
    sequence: Floats32
    log_hours: Floats32

    @property
    def probs(self) -> Floats:
        """Probabilities of no failure and each component first [N, H, 1 + C]."""
        return class_probs(self.hazard)


Make = Callable[[Examples, Floats32, Fit], MoETransformer]


def class_probs(hazards: Floats32) -> Floats:
    """Return the probabilities of the classes of each horizon [N, H, 1 + C]."""
    return first_failure(hazard_probs(hazards.reshape(-1, len(HORIZONS), NUM_COMPONENTS)))


def to_batch(series: Series, tree: Floats32, device: str) -> RaggedBatch:
    """Return series as a packed batch on a device."""
    extras = {"context": _tensor(series.context, device), "tree": _tensor(tree, device)}
    return RaggedBatch(_tensor(series.rows, device), _tensor(series.offsets, device), extras)


def _tensor(array: NDArray[np.generic], device: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def fit_sequence(examples: Examples, tree: Floats32, fit: Fit) -> MoETransformer:
    """Train the sequence experts on rows with cross-fitted tree answers."""
    torch.manual_seed(fit.seed)
    model = MoETransformer(PRESETS[fit.preset], [FORECAST.name]).to(fit.device)
    batch = examples.batch(tree, fit.device)
    learn(model, batch, examples, fit)
    rebalance_task(model, FORECAST.name, batch)
    return model


def loss_of(examples: Examples, device: str) -> Loss:
    """Return the likelihood of the sequence experts' hazards, and the quantiles of the hours left."""
    hours_BC, weight_B = _tensor(examples.hours, device), _tensor(examples.weight, device)
    observed_B = _tensor(examples.observed, device)
    known_B = _tensor(~np.isnan(examples.left), device)
    log_left_B = torch.log1p(_tensor(np.nan_to_num(examples.left), device))

    def loss(outputs: Tensor, chosen: Tensor) -> Tensor:
        weight = weight_B[chosen] / weight_B[chosen].sum()
        sequence = outputs[:, FIRST_SEQUENCE:].unflatten(1, (len(HORIZONS), NUM_COMPONENTS))
        quantiles = outputs[:, FIRST_HOURS:FIRST_HAZARD]
        hours = pinball_loss(quantiles, log_left_B[chosen]) * known_B[chosen]
        per_row = hazard_loss(sequence, hours_BC[chosen], observed_B[chosen]) + HOURS_WEIGHT * hours
        return (weight * per_row).sum()

    return loss


def learn(model: MoETransformer, batch: RaggedBatch, examples: Examples, fit: Fit) -> None:
    """Train whatever of a model is not frozen on examples and their batch, in place."""
    adapter = model.adapters[FORECAST.name]
    if isinstance(adapter, SeriesAdapter):
        adapter.fit_scaling(batch)
    settings = _settings(fit, examples.machine.size)
    sample = WeightedSample(FORECAST.name, batch, _tensor(examples.weight, fit.device))
    train_task(model, sample, loss_of(examples, fit.device), settings, fit.seed, lambda *_: None)


def _settings(fit: Fit, num_rows: int) -> TrainSettings:
    """Return the settings with as many epochs as few rows need."""
    per_epoch = max(num_rows // fit.settings.batch_size, 1)
    return replace(fit.settings, epochs=max(fit.settings.epochs, -(-LEAST_STEPS // per_epoch)))


def ask(model: MoETransformer, series: Series, tree: Floats32, device: str) -> Answers:
    """Return a model's answers."""
    outputs = predict(model, FORECAST.name, to_batch(series, tree, device))[0].cpu().numpy()
    return Answers(
        outputs[:, FIRST_HAZARD:FIRST_SEQUENCE],
        outputs[:, FIRST_SEQUENCE:],
        outputs[:, FIRST_HOURS:FIRST_HAZARD],
    )


def cross_fit_trees(examples: Examples, fit: Fit) -> Floats32:
    """Return trees' hazards of machines that they were not fitted on."""
    lives = examples.lives

    def fold(kept: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], Floats32]:
        booster = fit_hazard_trees(lives.take(kept), fit.seed, fit.threads)
        return lambda asked: ask_trees(booster, lives.context[asked])

    return cross_fit(examples.machine, NUM_HAZARDS, fold)


def cross_fit_sequence(
    examples: Examples, tree: Floats32, fit: Fit, make: Make = fit_sequence
) -> Floats32:
    """Return sequence experts' hazards and hours of machines that they have not seen.

    Returns:
        Hazards, then quantiles of log(1 + hours left) [N, H * C + 3].
    """

    def fold(kept: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], Floats32]:
        model = make(examples.take(kept), tree[kept], fit)

        def answer(asked: NDArray[np.bool_]) -> Floats32:
            answers = ask(model, examples.take(asked).series, tree[asked], fit.device)
            return np.concatenate([answers.sequence, answers.log_hours], axis=1)

        return answer

    return cross_fit(examples.machine, NUM_HAZARDS + 3, fold)


def calibrate(
    examples: Examples, tree: Floats32, fit: Fit, make: Make = fit_sequence
) -> Calibration:
    """Choose gate, cautions and margin on machines that the models ``make`` makes have not seen."""
    return choose(examples, tree, cross_fit_sequence(examples, tree, fit, make))


def choose(examples: Examples, tree: Floats32, answers: Floats32) -> Calibration:
    """Choose gate, cautions and margin.

    Args:
        examples: Rows [N].
        tree: Cross-fitted hazards of the trees [N, H * C].
        answers: As of ``cross_fit_sequence``.
    """
    sequence, log_hours = answers[:, :NUM_HAZARDS], answers[:, NUM_HAZARDS:]
    shape = (-1, len(HORIZONS), NUM_COMPONENTS)
    hours_BC, observed_B = torch.from_numpy(examples.hours), torch.from_numpy(examples.observed)
    weight_B = torch.from_numpy(examples.weight)

    def loss(hazard_BHC: Tensor) -> Tensor:
        return (weight_B * hazard_loss(hazard_BHC, hours_BC, observed_B)).sum()

    gate = fit_gate(
        torch.from_numpy(tree).view(shape), torch.from_numpy(sequence).view(shape), loss
    ).numpy()
    probs = class_probs(mixed(tree, sequence, gate))
    caution = {}
    for i, horizon in enumerate(HORIZONS):
        seen = examples.observed >= horizon
        truth = labels(examples.hours[seen], horizon)
        caution[horizon] = tune_caution(probs[seen, i], truth, CAUTIONS)
    known = ~np.isnan(examples.left)
    left, cap = np.log1p(examples.left[known]), float(np.log1p(LIFE_CAP_HOURS))
    margin = conformal_margin(log_hours[known], left, cap, examples.machine[known])
    return Calibration(caution, margin, gate)


def mixed(tree: Floats32, sequence: Floats32, gate: Floats32) -> Floats32:
    """Return the hazards of both experts under the gate, as the head mixes them [N, H * C]."""
    share = 1.0 / (1.0 + np.exp(-gate.reshape(1, -1)))
    hazards: Floats32 = tree + share * (sequence - tree)
    return hazards


def install(model: MoETransformer, calibration: Calibration) -> None:
    """Put the calibrated gate into the head."""
    head = model.heads[FORECAST.name]
    if isinstance(head, HazardHead):
        head.gate.copy_(torch.from_numpy(calibration.gate))
