"""What the maintenance application brings to joint training (see ``apps.joint.Lesson``).

Of the machines a fifth is kept from training: gate, cautions and the margin of the intervals
are chosen on them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import numpy as np
from xgboost import Booster

from apps.maintenance.degrade import VARIANTS
from apps.maintenance.fleet import Bools, Fleet, Floats32
from apps.maintenance.inputs import Series, forecast_inputs
from apps.maintenance.protocol import HORIZONS, decide, hours_to_failure, labels, macro_f1
from apps.maintenance.training.azure_report import PartReport
from apps.maintenance.training.azure_runs import Runs, stored
from apps.maintenance.training.fit import (
    SETTINGS,
    Calibration,
    Examples,
    Fit,
    ask,
    choose,
    class_probs,
    cross_fit_trees,
    install,
    loss_of,
    mixed,
    to_batch,
)
from apps.maintenance.training.train import (
    carry_trees,
    chosen_by,
    training_part,
    write_chosen,
)
from apps.maintenance.training.trees import ask_trees, fit_hazard_trees
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.series import SeriesAdapter
from core_model.series_tasks import FORECAST
from core_model.training import SampleSource, WeightedSample, device_of, in_parts

ALL_SEQUENCE = 50.0  # logit of a gate that leaves the trees out
HELD_EACH = 5  # every fifth machine is kept from training
RECENT_SHARE = 0.5  # of the record before the test: docs/log.md#as-they-are-served
RECENT_ROWS = 25_000  # of some 15 tokens: as many as experts are balanced on


class Taught(NamedTuple):
    """Hours with what the trees say of them.

    Args:
        examples: Rows [N].
        tree: Hazards of trees that have not seen their machines [N, H * C]; zeros without trees.
    """

    examples: Examples
    tree: Floats32


class Asked(NamedTuple):
    """Hours as the model takes them.

    Args:
        series: Rows [N].
        tree: Hazards of the trees that are served [N, H * C]; zeros without trees.
    """

    series: Series
    tree: Floats32

    def batch(self, device: str) -> RaggedBatch:
        """Return both as the adapter takes them."""
        return to_batch(self.series, self.tree, device)


@dataclass(frozen=True, slots=True)
class ForecastLesson:
    """Hours of a fleet's machines; the end of the record is held out.

    Args:
        data: Where they come from, in words.
        runs: The record, and how it is split.
        seen: Hours to train on.
        kept: Hours of the machines that were kept from training.
        recent: Hours of the later half of the record before the test, with what the trees say.
        test: Hours at the end of the record, likewise.
        booster: The trees that are served; None leaves the tree expert out.
    """

    data: str
    runs: Runs
    seen: Taught
    kept: Taught
    recent: Asked
    test: Asked
    booster: Booster | None

    @classmethod
    def of(cls, fleet: Fleet, data: str, work: Path, seed: int) -> Self:
        """Prepare a fleet with its failures.

        Args:
            fleet: Its record.
            data: Where it comes from, in words.
            work: Folder of cross-fitted trees, which are reused.
            seed: Of the trees.
        """
        work.mkdir(parents=True, exist_ok=True)
        part, threads = training_part(fleet), len(os.sched_getaffinity(0))
        runs = Runs(part, work, "cpu", "", threads, _nothing)
        whole, fit = runs.examples(), Fit(seed, threads=threads)
        kept = stored(runs.path("trees"), lambda: {"tree": cross_fit_trees(whole, fit)})
        tree = kept["tree"].astype(np.float32)
        position = np.unique(whole.machine, return_inverse=True)[1]
        is_held = position % HELD_EACH == HELD_EACH - 1
        booster = fit_hazard_trees(whole.lives, seed, threads)
        begin, end = (1 - RECENT_SHARE) * part.train_end, part.train_end
        recent = np.flatnonzero((part.rows.hour >= begin) & (part.rows.hour < end))
        drawn = np.random.default_rng(seed).permutation(recent)[:RECENT_ROWS]
        is_recent = np.isin(np.arange(part.rows.size), drawn)

        def asked(chosen: Bools) -> Asked:
            series = forecast_inputs(fleet, part.rows.take(chosen), runs.period)
            return Asked(series, ask_trees(booster, series.context))

        return cls(
            data=data,
            runs=runs,
            seen=Taught(whole.take(~is_held), tree[~is_held]),
            kept=Taught(whole.take(is_held), tree[is_held]),
            recent=asked(is_recent),
            test=asked(runs.tested),
            booster=booster,
        )

    @property
    def task(self) -> str:
        """Forecast."""
        return FORECAST.name

    def without_trees(self) -> Self:
        """Return the same without the tree expert."""
        seen, kept = (
            each._replace(tree=np.zeros_like(each.tree)) for each in (self.seen, self.kept)
        )
        recent, test = (
            each._replace(tree=np.zeros_like(each.tree)) for each in (self.recent, self.test)
        )
        return replace(self, seen=seen, kept=kept, recent=recent, test=test, booster=None)

    def source(self, device: str, seed: int) -> SampleSource:
        """Return its draws."""
        examples, batch = self.seen.examples, self.seen.examples.batch(self.seen.tree, device)
        weights = batch.features.new_tensor(examples.weight)
        return SampleSource(
            WeightedSample(FORECAST.name, batch, weights),
            loss_of(examples, device),
            SETTINGS.batch_size,
            seed,
            SETTINGS.peak_lr,
            SETTINGS.weight_decay,
        )

    def prepare(self, model: MoETransformer) -> None:
        """Take the scale of sensors and context."""
        adapter = model.adapters[FORECAST.name]
        if not isinstance(adapter, SeriesAdapter):
            message = f"expected a model of {FORECAST.name}, got {type(adapter).__name__}"
            raise TypeError(message)
        adapter.fit_scaling(self.seen.examples.batch(self.seen.tree, device_of(model)))

    def traffic(self, device: str) -> Iterator[RaggedBatch]:
        """Yield hours before the test as they came, drawn at random."""
        return in_parts(self.recent.batch(device))

    def held_out(self, device: str) -> Iterator[RaggedBatch]:
        """Yield the hours at the end of the record."""
        return in_parts(self.test.batch(device))

    def finish(self, model: MoETransformer, folder: Path) -> None:
        """Put gate and trees into the model, and write cautions and margin beside the weights."""
        calibration = self._calibrate(model)
        install(model, calibration)
        if self.booster is not None:
            carry_trees(model, self.booster)
        usual = np.nanmean(self.runs.part.fleet.telemetry, axis=(0, 1))
        chosen = chosen_by(self.runs, calibration) | {"usual": usual.round(4).tolist()}
        write_chosen(folder, chosen | self.report(model, calibration))

    def report(self, model: MoETransformer, calibration: Calibration) -> dict[str, Any]:
        """Return figures on the end of the record, with all inputs and with one of them gone."""
        booster = self.booster
        if booster is None:
            return {"held_out": {}, "degraded": {}}
        with TemporaryDirectory() as folder:
            runs = replace(self.runs, folder=Path(folder), device=device_of(model))
            runs.calibration(lambda: calibration)
            stored(runs.path("ours-0"), lambda: runs.ask_variants(model, booster))
            report = PartReport(runs, 1)
            return {"held_out": report.horizons(VARIANTS[0]), "degraded": report.degraded()}

    def measure(self, model: MoETransformer) -> dict[str, float]:
        """Return macro F1 at each horizon on the end of the record."""
        scores = self._scores(model, self._calibrate(model))
        return {f"macro_f1_{h}h": score for h, score in scores.items()}

    def _scores(self, model: MoETransformer, calibration: Calibration) -> dict[int, float]:
        part = self.runs.part
        rows = part.rows.take(self.runs.tested)
        hours = hours_to_failure(part.fleet.failures, rows, len(part.fleet.components))
        series, tree = self.test
        sequence = ask(model, series, tree, device_of(model)).sequence
        probs = class_probs(mixed(tree, sequence, calibration.gate))
        found = {}
        for i, horizon in enumerate(HORIZONS):
            tested = rows.hour < part.test_end - horizon
            predicted = decide(probs[tested, i], calibration.caution[horizon])
            found[horizon] = macro_f1(labels(hours[tested], horizon), predicted, probs.shape[2])
        return found

    def _calibrate(self, model: MoETransformer) -> Calibration:
        """Return gate, cautions and margin by the machines that were kept from training."""
        examples, tree = self.kept
        answers = ask(model, examples.series, tree, device_of(model))
        both = np.concatenate([answers.sequence, answers.log_hours], axis=1)
        if self.booster is not None:
            return choose(examples, tree, both)
        found = choose(examples, answers.sequence, both)  # two that agree, whatever the gate
        return replace(found, gate=np.full_like(found.gate, ALL_SEQUENCE))


def _nothing(_: str) -> None:
    """Say nothing."""
