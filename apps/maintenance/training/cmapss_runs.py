"""The runs behind ``trimoe maintenance evaluate --dataset cmapss``; finished ones are reused.

Legend: N rows, U units.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightgbm
import numpy as np
import torch
import xgboost
from numpy.typing import NDArray
from torch import Tensor

from apps.maintenance.cmapss import CAP_CYCLES, Table, load_subset, nasa_score, rmse
from apps.maintenance.fleet import Floats, Floats32, Ints
from apps.maintenance.inputs import Series
from apps.maintenance.intervals import conformal_margin
from apps.maintenance.life_inputs import life_inputs
from apps.maintenance.training.azure_runs import Stored, nothing, stored
from apps.maintenance.training.baseline import PARAMETERS as BASELINE_PARAMETERS
from apps.maintenance.training.fit import Fit, to_batch
from apps.maintenance.training.trees import cross_fit
from apps.maintenance.wear import Wear, learn_wear, recipe_features
from core_model.config import PRESETS
from core_model.hazard import LIFE_SCALE, LifeHead, pinball_loss
from core_model.model import MoETransformer
from core_model.series import SeriesAdapter
from core_model.series_tasks import RUL, RUL_LIVES
from core_model.training import TrainSettings, WeightedSample, predict, rebalance_task, train_task

RECIPE: Mapping[str, Any] = {  # of the published baseline
    **BASELINE_PARAMETERS,
    "n_estimators": 300,
    "learning_rate": 0.03,
}
TREES: Mapping[str, Any] = {  # shallow: deep ones recognise units, see docs/log.md
    "objective": "reg:squarederror",
    "base_score": 0.0,
    "eta": 0.03,
    "max_depth": 3,
    "min_child_weight": 60,
    "subsample": 0.7,
    "colsample_bytree": 0.6,
    "reg_lambda": 5,
    "tree_method": "hist",
}
NUM_ROUNDS = 700
SETTINGS = TrainSettings(epochs=10, batch_size=256, peak_lr=2e-3, weight_decay=0.1)
MOST_ROWS = 20_000  # of training; neighbouring cycles say almost the same
FADE_CYCLES = 40.0  # rows above the cap count less by e every so many cycles
REACH = 1.2  # of the cap
QUANTILE_WEIGHT = 0.3  # beside the squared errors
NUM_LIVES = len(RUL_LIVES)


class LifeExamples(NamedTuple):
    """Rows with their remaining life.

    Args:
        series: Inputs.
        unit: [N].
        lives: Early life and life [N, 2].
        weight: [N].
    """

    series: Series
    unit: Ints
    lives: Floats32
    weight: Floats32

    def take(self, rows: Ints) -> "LifeExamples":
        """Return the rows named."""
        return LifeExamples(
            self.series.take(rows), self.unit[rows], self.lives[rows], self.weight[rows]
        )


def life_examples(table: Table, wear: Wear) -> LifeExamples:
    """Return all rows of training units."""
    lives = np.stack([np.minimum(table.rul, CAP_CYCLES), table.rul], axis=1).astype(np.float32)
    weight = np.exp(-np.maximum(table.rul - CAP_CYCLES, 0.0) / FADE_CYCLES).astype(np.float32)
    return LifeExamples(life_inputs(table, wear), table.unit, lives, weight)


def fit_life_trees(examples: LifeExamples, seed: int, threads: int) -> xgboost.Booster:
    """Fit early life and life."""
    data = xgboost.DMatrix(examples.series.context, examples.lives, weight=examples.weight)
    return xgboost.train({**TREES, "seed": seed, "nthread": threads}, data, NUM_ROUNDS)


def ask_life_trees(booster: xgboost.Booster, context: Floats32) -> Floats32:
    """Return early life and life [N, 2]."""
    answers: Floats32 = booster.predict(xgboost.DMatrix(context))
    return answers


def fit_life(examples: LifeExamples, tree: Floats32, fit: Fit) -> MoETransformer:
    """Train the sequence experts and the quantiles."""
    torch.manual_seed(fit.seed)
    generator = torch.Generator().manual_seed(fit.seed)
    model = MoETransformer(PRESETS[fit.preset], [RUL.name]).to(fit.device)
    batch = to_batch(examples.series, tree, fit.device)
    adapter = model.adapters[RUL.name]
    if isinstance(adapter, SeriesAdapter):
        adapter.fit_scaling(batch)
    lives_B2 = torch.from_numpy(examples.lives).to(fit.device)
    weight_B = torch.from_numpy(examples.weight).to(fit.device)

    def loss(outputs: Tensor, chosen: Tensor) -> Tensor:
        """Squared errors of the sequence experts, and the quantiles of early life."""
        weight = weight_B[chosen] / weight_B[chosen].sum()
        sequence = outputs[:, 2 * NUM_LIVES : 3 * NUM_LIVES]
        error = ((sequence - lives_B2[chosen]) / LIFE_SCALE).square().sum(dim=1)
        quantile = pinball_loss(outputs[:, 3 * NUM_LIVES :], lives_B2[chosen, 0]) / LIFE_SCALE
        return (weight * (error + QUANTILE_WEIGHT * quantile)).sum()

    sample = WeightedSample(RUL.name, batch, weight_B)
    train_task(model, sample, loss, fit.settings, generator, lambda *_: None)
    rebalance_task(model, RUL.name, batch)
    return model


def ask_life(model: MoETransformer, series: Series, tree: Floats32, device: str) -> Floats32:
    """Return all output columns [N, 9]."""
    answers: Floats32 = predict(model, RUL.name, to_batch(series, tree, device))[0].cpu().numpy()
    return answers


def best_share(tree: Floats32, sequence: Floats32, truth: Floats32, weight: Floats32) -> float:
    """Return the share of the sequence experts with the least squared error, in [.05, .95]."""
    step, missing = sequence - tree, truth - tree
    share = (weight * step * missing).sum() / max(float((weight * step * step).sum()), 1e-9)
    return float(np.clip(share, 0.05, 0.95))


def with_excess(lives_N2: Floats, share: float) -> Floats:
    """Return life: early life and a share of what is forecast beyond it [N]."""
    beyond = np.maximum(lives_N2[:, 1] - lives_N2[:, 0], 0.0)
    total: Floats = lives_N2[:, 0] + share * beyond
    return total


def choose_excess(lives_N2: Floats, truth: Floats) -> float:
    """Return the share of the excess with the least RMSE x score on held-out rows.

    Only rows with up to ``REACH`` times the cap left count: earlier nobody asks.
    """
    asked = truth <= REACH * CAP_CYCLES
    shares = np.linspace(0.0, 1.0, 21)

    def cost(share: float) -> float:
        life = with_excess(lives_N2[asked], share)
        return rmse(life, truth[asked]) * nasa_score(life, truth[asked])

    return float(min(shares, key=cost))


@dataclass(frozen=True, slots=True)
class LifeRuns:
    """One subset's trainings and their answers on its test units.

    Args:
        data: Folder of the tables; subset: Their name.
        folder: Of finished parts.
        device: Of the model; preset: Sizes of the shared core.
        threads: Of the trees.
        say: Progress.
    """

    data: Path
    subset: str
    folder: Path
    device: str
    preset: str
    threads: int
    say: Callable[[str], None]

    def run(self, seeds: range) -> None:
        """Train and ask, unless that is done."""
        if all(self.path(f"{kind}-{s}").exists() for kind in ("ours", "baseline") for s in seeds):
            return
        train, test, truth = load_subset(self.data, self.subset)
        wear = learn_wear(train)
        self.say(
            f"{self.subset}: {wear.regimes.centres.shape[0]} regimes, sensors "
            + ", ".join(train.sensor_names[i].removeprefix("sensor_") for i in wear.regimes.used)
        )
        stored(self.path("truth"), lambda: {"truth": truth})
        for seed in seeds:
            stored(self.path(f"baseline-{seed}"), lambda: self._baseline(train, test, wear, seed))  # noqa: B023 - called at once
        self.say(f"{self.subset}: baseline done")
        self._run_ours(train, test, wear, seeds)

    def _baseline(self, train: Table, test: Table, wear: Wear, seed: int) -> Stored:
        model = lightgbm.LGBMRegressor(**RECIPE, random_state=seed, n_jobs=self.threads)
        model.fit(recipe_features(train, wear.regimes), np.minimum(train.rul, CAP_CYCLES))
        asked = recipe_features(test, wear.regimes)[test.last_rows]
        return {"life": np.asarray(model.booster_.predict(asked))}

    def _run_ours(self, train: Table, test: Table, wear: Wear, seeds: range) -> None:
        started = time.monotonic()
        whole = life_examples(train, wear)
        stride = -(-whole.unit.size // MOST_ROWS)
        chosen = np.arange(0, whole.unit.size, stride)
        thinned = whole.take(chosen)
        fit = Fit(0, self.device, self.preset, self.threads, self.subset, SETTINGS)
        tree = self._cross_fit_trees(whole)[chosen]
        self.say(f"{self.subset}: {chosen.size} rows, trees cross-fitted")
        self.calibration(lambda: self._calibrate(thinned, tree, fit))
        self.say(f"{self.subset}: calibrated on held-out units")
        last = life_inputs(test, wear).take(test.last_rows)
        for seed in seeds:
            label = f"{self.subset} seed {seed}"
            seeded = Fit(seed, self.device, self.preset, self.threads, label, SETTINGS)

            def ask(seeded: Fit = seeded) -> Stored:
                booster = fit_life_trees(whole, seeded.seed, self.threads)
                model = fit_life(thinned, tree, seeded)
                self._install(model)
                trees = ask_life_trees(booster, last.context)
                return {"outputs": ask_life(model, last, trees, self.device)}

            stored(self.path(f"ours-{seed}"), ask)
            self.say(f"{label} done after {time.monotonic() - started:.0f} s")

    def _cross_fit_trees(self, examples: LifeExamples) -> Floats32:
        def fold(kept: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], Floats32]:
            booster = fit_life_trees(examples.take(np.flatnonzero(kept)), 0, self.threads)
            return lambda asked: ask_life_trees(booster, examples.series.context[asked])

        found = stored(
            self.path("trees"), lambda: {"tree": cross_fit(examples.unit, NUM_LIVES, fold)}
        )
        return found["tree"].astype(np.float32)

    def _calibrate(self, examples: LifeExamples, tree: Floats32, fit: Fit) -> Stored:
        def fold(kept: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], Floats32]:
            rows = np.flatnonzero(kept)
            model = fit_life(examples.take(rows), tree[rows], fit)

            def answer(asked: NDArray[np.bool_]) -> Floats32:
                held = np.flatnonzero(asked)
                return ask_life(model, examples.series.take(held), tree[held], self.device)

            return answer

        outputs = cross_fit(examples.unit, len(RUL.outputs), fold)
        sequence = outputs[:, 2 * NUM_LIVES : 3 * NUM_LIVES]
        lives, weight = examples.lives, examples.weight
        shares = [
            best_share(tree[:, i], sequence[:, i], lives[:, i], weight) for i in range(NUM_LIVES)
        ]
        mixed = tree + np.array(shares) * (sequence - tree)
        margin = conformal_margin(outputs[:, 3 * NUM_LIVES :], lives[:, 0], CAP_CYCLES)
        return {
            "gate": np.log(shares) - np.log1p(-np.array(shares)),
            "margin": np.array(margin),
            "excess": np.array(choose_excess(mixed, lives[:, 1].astype(np.float64))),
        }

    def calibration(self, make: Callable[[], Stored] | None = None) -> Stored:
        """Return gate and margin, made first if they are not there."""
        return stored(self.path("calibration"), make or nothing)

    def _install(self, model: MoETransformer) -> None:
        head = model.heads[RUL.name]
        if isinstance(head, LifeHead):
            head.gate.copy_(torch.from_numpy(self.calibration()["gate"].astype(np.float32)))

    def path(self, what: str) -> Path:
        """Return where a finished part lies."""
        return self.folder / f"{self.subset}-{what}.npz"
