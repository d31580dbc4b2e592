"""The runs behind ``trimoe maintenance evaluate --dataset cmapss``; finished ones are reused.

Legend: N rows, U units.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
from numpy.typing import NDArray

from apps.maintenance.cmapss import CAP_CYCLES, Table, load_subset
from apps.maintenance.fleet import Floats32
from apps.maintenance.life_inputs import life_inputs
from apps.maintenance.training.azure_runs import Stored, nothing, stored
from apps.maintenance.training.baseline import PARAMETERS as BASELINE_PARAMETERS
from apps.maintenance.training.fit import Fit
from apps.maintenance.training.life_choice import LifeChoice, choose_life
from apps.maintenance.training.life_fit import (
    NUM_LIVES,
    SETTINGS,
    LifeExamples,
    ask_life,
    ask_life_trees,
    fit_life,
    fit_life_trees,
    life_examples,
)
from apps.maintenance.training.trees import cross_fit
from apps.maintenance.wear import Wear, learn_wear, recipe_features
from core_model.series_tasks import RUL

RECIPE: Mapping[str, Any] = {  # of the published baseline
    **BASELINE_PARAMETERS,
    "n_estimators": 300,
    "learning_rate": 0.03,
}
MOST_ROWS = 8_000  # that the sequence experts see; neighbouring cycles say almost the same


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
        held = self._cross_fit_sequence(thinned, tree, fit)
        self.choice(lambda: choose_life(thinned, tree, held))
        self.say(f"{self.subset}: calibrated on held-out units")
        last = life_inputs(test, wear).take(test.last_rows)
        for seed in seeds:
            label = f"{self.subset} seed {seed}"
            seeded = Fit(seed, self.device, self.preset, self.threads, label, SETTINGS)

            def ask(seeded: Fit = seeded) -> Stored:
                booster = fit_life_trees(whole, seeded.seed, self.threads)
                model = fit_life(thinned, tree, seeded)
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

    def _cross_fit_sequence(self, examples: LifeExamples, tree: Floats32, fit: Fit) -> Floats32:
        def fold(kept: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], Floats32]:
            rows = np.flatnonzero(kept)
            model = fit_life(examples.take(rows), tree[rows], fit)

            def answer(asked: NDArray[np.bool_]) -> Floats32:
                held = np.flatnonzero(asked)
                return ask_life(model, examples.series.take(held), tree[held], self.device)

            return answer

        found = stored(
            self.path("held"), lambda: {"outputs": cross_fit(examples.unit, len(RUL.outputs), fold)}
        )
        return found["outputs"].astype(np.float32)

    def choice(self, make: Callable[[], LifeChoice] | None = None) -> LifeChoice:
        """Return what was chosen on held-out units, made first if it is not there."""

        def arrays() -> Stored:
            if make is None:
                return nothing()
            made = make()
            return {
                "share": made.share,
                "excess": np.array(made.excess),
                "margins": made.margins,
            }

        kept = stored(self.path("choice"), arrays)
        share, margins = (kept[name].astype(np.float64) for name in ("share", "margins"))
        return LifeChoice(share, float(kept["excess"]), margins)

    def path(self, what: str) -> Path:
        """Return where a finished part lies."""
        return self.folder / f"{self.subset}-{what}.npz"
