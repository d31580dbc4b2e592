"""The runs behind ``trimoe maintenance evaluate --dataset azure``; finished ones are reused.

Legend: N rows, H horizons, C components.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xgboost import Booster

from apps.maintenance.degrade import VARIANTS, degraded, joined
from apps.maintenance.features import hours_to_service, service_period
from apps.maintenance.fleet import Bools
from apps.maintenance.inputs import LIFE_CAP_HOURS, forecast_inputs
from apps.maintenance.protocol import HORIZONS, hours_to_failure, labels, tune_caution
from apps.maintenance.splits import Part
from apps.maintenance.training.baseline import (
    baseline_columns,
    cross_fit_classes,
    forecast_classes,
)
from apps.maintenance.training.fit import (
    CAUTIONS,
    Calibration,
    Examples,
    Fit,
    ask,
    choose,
    cross_fit_sequence,
    cross_fit_trees,
    fit_sequence,
)
from apps.maintenance.training.trees import ask_trees, fit_hazard_trees
from core_model.model import MoETransformer

Stored = Mapping[str, NDArray[np.generic]]
FAR_HOURS = HORIZONS[-1] + 3  # to the coming visit: beyond, nothing is about to happen
MOST_FAR_ROWS = 12_000  # of those are trained on, each with the weight of all it stands for
DEGRADED_SHARE = 0.25  # of the rows are trained on again with one input gone


def stored(path: Path, make: Callable[[], Stored]) -> Stored:
    """Return what a file holds, made first if it is not there; it appears whole or not at all."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        np.savez(partial, allow_pickle=False, **dict(make()))
        partial.rename(path)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def nothing() -> Stored:
    """Stand for a part that must be there already.

    Raises:
        FileNotFoundError: Always.
    """
    message = "expected a finished run in the work folder, found none; run the evaluation again"
    raise FileNotFoundError(message)


@dataclass(frozen=True, slots=True)
class Runs:
    """One input's trainings and their answers on its test rows.

    Args:
        part: The input.
        folder: Of finished parts.
        device: Of the model.
        preset: Sizes of the shared core.
        threads: Of the trees.
        say: Progress.
    """

    part: Part
    folder: Path
    device: str
    preset: str
    threads: int
    say: Callable[[str], None]

    @property
    def has_telemetry(self) -> bool:
        """Whether the input has telemetry, and with it degraded variants."""
        return not bool(np.isnan(self.part.fleet.telemetry).all())

    @property
    def period(self) -> int:
        """Rhythm of the visits as the training time knows it, in hours."""
        return service_period(self.part.fleet.maintenance.before(self.part.train_end))

    def examples(self) -> Examples:
        """Return the training rows: all near a visit, some far from it, some degraded."""
        part, generator = self.part, np.random.default_rng(0)
        train = part.rows.take(part.train(HORIZONS[0]))
        is_far = hours_to_service(part.fleet.maintenance, train, self.period) > FAR_HOURS
        share = min(1.0, MOST_FAR_ROWS / max(int(is_far.sum()), 1))
        kept = ~is_far | (generator.random(train.size) < share)
        rows, is_far = train.take(kept), is_far[kept]
        series = forecast_inputs(part.fleet, rows, self.period)
        hours = hours_to_failure(part.fleet.failures, rows, len(part.fleet.components))
        left = np.minimum(hours.min(axis=1), LIFE_CAP_HOURS).astype(np.float32)
        left[rows.hour > part.train_end - LIFE_CAP_HOURS] = np.nan
        weight = np.where(is_far, 1.0 / share, 1.0).astype(np.float32)
        observed = part.train_end - 1 - rows.hour
        whole = Examples(series, rows.machine, hours, observed, left, weight)
        if not self.has_telemetry:
            return whole
        again = [whole]
        for variant in VARIANTS[1:]:
            chosen = whole.take(generator.random(rows.size) < DEGRADED_SHARE)
            again.append(chosen.with_series(degraded(chosen.series, variant)))
        return Examples(
            joined([e.series for e in again]),
            *(
                np.concatenate([getattr(e, name) for e in again])
                for name in ("machine", "hours", "observed", "left", "weight")
            ),
        )

    def run_ours(self, seeds: range) -> None:
        """Train and ask, unless that is done."""
        name, start = self.part.name, time.monotonic()
        missing = [s for s in seeds if not self.path(f"ours-{s}").exists()]
        if not missing:
            return
        examples = self.examples()
        fit = Fit(0, self.device, self.preset, self.threads, name)
        stored(self.path("trees"), lambda: {"tree": cross_fit_trees(examples, fit)})
        tree = self.tree_answers()
        self.say(f"{name}: {examples.machine.size} rows, trees cross-fitted")
        held = stored(
            self.path("held"), lambda: {"answers": cross_fit_sequence(examples, tree, fit)}
        )["answers"].astype(np.float32)
        self.calibration(lambda: choose(examples, tree, held))
        self.say(f"{name}: calibrated on held-out machines")
        for seed in missing:
            seeded = Fit(seed, self.device, self.preset, self.threads, f"{name} seed {seed}")
            stored(self.path(f"ours-{seed}"), lambda: self._ask_test(examples, tree, seeded))  # noqa: B023 - called at once
            self.say(f"{name}: seed {seed} done after {time.monotonic() - start:.0f} s")

    def tree_answers(self) -> NDArray[np.float32]:
        """Return the cross-fitted answers of the trees on the training rows [N, H * C]."""
        return stored(self.path("trees"), nothing)["tree"].astype(np.float32)

    def _ask_test(self, examples: Examples, tree: NDArray[np.float32], fit: Fit) -> Stored:
        booster = fit_hazard_trees(examples.lives, fit.seed, self.threads)
        model = fit_sequence(examples, tree, fit)
        return self.ask_variants(model, booster)

    def ask_variants(self, model: MoETransformer, booster: Booster) -> Stored:
        """Return what trees and sequence experts say of the test rows, by the inputs left."""
        test = forecast_inputs(self.part.fleet, self.part.rows.take(self.tested), self.period)
        found: dict[str, NDArray[np.generic]] = {}
        for variant in VARIANTS if self.has_telemetry else VARIANTS[:1]:
            series = degraded(test, variant)
            trees = ask_trees(booster, series.context)
            answers = ask(model, series, trees, self.device)
            found |= {
                f"sequence_{variant}": answers.sequence,
                f"tree_{variant}": trees,
                f"log_hours_{variant}": answers.log_hours,
            }
        return found

    def calibration(self, make: Callable[[], Calibration] | None = None) -> Calibration:
        """Return what was chosen on held-out machines, made first if it is not there."""

        def arrays() -> Stored:
            if make is None:
                return nothing()
            made = make()
            caution = np.array([made.caution[h] for h in HORIZONS])
            return {"caution": caution, "margin": np.array(made.margin), "gate": made.gate}

        kept = stored(self.path("calibration"), arrays)
        caution = dict(zip(HORIZONS, kept["caution"].astype(float).tolist(), strict=True))
        return Calibration(caution, float(kept["margin"]), kept["gate"].astype(np.float32))

    def run_baseline(self, seeds: range) -> None:
        """Fit LightGBM for every horizon and seed, with its caution, unless that is done."""
        part = self.part
        wanted = ["baseline-caution", *(f"baseline-{s}" for s in seeds)]
        if all(self.path(what).exists() for what in wanted):
            return
        columns = baseline_columns(part)
        hours = hours_to_failure(part.fleet.failures, part.rows, len(part.fleet.components))

        def probs(seed: int) -> Stored:
            found = {}
            for horizon in HORIZONS:
                train, truth = part.train(horizon), labels(hours, horizon)
                found[str(horizon)] = forecast_classes(
                    columns[train], truth[train], columns[self.tested], seed, self.threads
                )
            return found

        def caution() -> Stored:
            chosen = []
            for horizon in HORIZONS:
                train, truth = part.train(horizon), labels(hours, horizon)
                machine = part.rows.machine[train]
                held = cross_fit_classes(columns[train], truth[train], machine, 0, self.threads)
                chosen.append(tune_caution(held, truth[train], CAUTIONS))
            return {"caution": np.array(chosen)}

        for seed in seeds:
            stored(self.path(f"baseline-{seed}"), lambda: probs(seed))  # noqa: B023 - called at once
        stored(self.path("baseline-caution"), caution)
        self.say(f"{part.name}: baseline done")

    @property
    def tested(self) -> Bools:
        """Rows after the test's start; a horizon's own end comes in the report."""
        return (self.part.rows.hour > self.part.test_start) & (
            self.part.rows.hour < self.part.test_end
        )

    def path(self, what: str) -> Path:
        """Return where a finished part lies."""
        return self.folder / f"{self.part.name}-{what}.npz"
