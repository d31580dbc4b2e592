"""Figures of the Azure evaluation from stored runs, ours beside LightGBM on the same rows."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from apps.maintenance.degrade import VARIANTS
from apps.maintenance.fleet import Floats
from apps.maintenance.inputs import LIFE_CAP_HOURS
from apps.maintenance.intervals import covered
from apps.maintenance.protocol import (
    HORIZONS,
    Forecasts,
    decide,
    hours_to_failure,
    labels,
    metrics,
)
from apps.maintenance.training.azure_runs import Runs, nothing, stored
from apps.maintenance.training.fit import class_probs, mixed

EXPERTS = ("tree", "sequence")
COLUMNS = (
    "  h   system    macro F1 (argmax)  PR-AUC  caught  >=36 h >=40 h >=44 h  false/month (argmax)"
)


class PartReport:
    """Figures of one input."""

    def __init__(self, runs: Runs, num_seeds: int) -> None:
        self.runs, self.num_seeds = runs, num_seeds
        part = runs.part
        self.rows = part.rows.take(runs.tested)
        self.hours = hours_to_failure(part.fleet.failures, self.rows, len(part.fleet.components))
        ours = runs.calibration()
        self.caution, self.margin, self.gate = ours.caution, ours.margin, ours.gate

    @cached_property
    def baseline_caution(self) -> dict[int, float]:
        """Factors that LightGBM's chances were tuned to."""
        kept = stored(self.runs.path("baseline-caution"), nothing)["caution"]
        return dict(zip(HORIZONS, kept.tolist(), strict=True))

    def figures(self) -> dict[str, Any]:
        """Return the input's block of the JSON file."""
        part = self.runs.part
        seeds = [self._ours(seed, "both", "hazard") for seed in range(self.num_seeds)]
        experts = {
            name: average([self._ours(s, "both", name) for s in range(self.num_seeds)])
            for name in EXPERTS
        }
        baseline = [self._baseline(seed) for seed in range(self.num_seeds)]
        coverage = [self.coverage(seed) for seed in range(self.num_seeds)]
        return {
            "horizons": average(seeds),
            "interval_coverage": float(np.mean(coverage)),
            "case_control": part.case_control,
            "baseline": {"horizons": average(baseline)},
            "experts": {name: {"horizons": values} for name, values in experts.items()},
            "caution": {"ours": self.caution, "baseline": self.baseline_caution},
            "seeds": [
                {"seed": i, "horizons": h, "interval_coverage": c}
                for i, (h, c) in enumerate(zip(seeds, coverage, strict=True))
            ],
        }

    def degraded(self) -> dict[str, Any]:
        """Return the same model's figures with one input gone, by what is left."""
        return {variant: {"horizons": self.horizons(variant)} for variant in VARIANTS}

    def horizons(self, variant: str) -> dict[str, Any]:
        """Return our figures at each horizon with the inputs of a variant."""
        seeds = [self._ours(seed, variant, "hazard") for seed in range(self.num_seeds)]
        averaged: dict[str, Any] = average(seeds)
        return averaged

    def coverage(self, seed: int) -> float:
        """Return how often the interval of the hours left holds, on rows where they are known."""
        part = self.runs.part
        run = stored(self.runs.path(f"ours-{seed}"), nothing)
        known = self.rows.hour < part.test_end - LIFE_CAP_HOURS
        left = np.log1p(np.minimum(self.hours.min(axis=1), LIFE_CAP_HOURS))
        quantiles = run["log_hours_both"][known].astype(np.float32)
        return float(
            covered(quantiles, left[known], self.margin, float(np.log1p(LIFE_CAP_HOURS))).mean()
        )

    def _ours(self, seed: int, variant: str, expert: str) -> dict[str, Any]:
        run = stored(self.runs.path(f"ours-{seed}"), nothing)
        tree, sequence = (run[f"{name}_{variant}"].astype(np.float32) for name in EXPERTS)
        hazards = {"hazard": mixed(tree, sequence, self.gate), "tree": tree, "sequence": sequence}
        probs = class_probs(hazards[expert])
        return {
            str(h): self._judge(probs[:, i], h, self.caution[h]) for i, h in enumerate(HORIZONS)
        }

    def _baseline(self, seed: int) -> dict[str, Any]:
        run = stored(self.runs.path(f"baseline-{seed}"), nothing)
        return {
            str(h): self._judge(run[str(h)].astype(np.float64), h, self.baseline_caution[h])
            for h in HORIZONS
        }

    def _judge(self, probs: Floats, horizon: int, caution: float) -> dict[str, Any]:
        """Return the metrics at the tuned caution, and macro F1 and false alarms without it."""
        part = self.runs.part
        kept = self.rows.hour < part.test_end - horizon
        rows, truth = self.rows.take(kept), labels(self.hours[kept], horizon)
        events = part.events(horizon)

        def at(factor: float) -> dict[str, Any]:
            predicted = decide(probs[kept], factor)
            return metrics(Forecasts(rows, truth, probs[kept], predicted, events, horizon))

        plain = at(1.0)
        kept_names = ("macro_f1", "events_caught", "lead_hours", "false_alarms_per_machine_month")
        return {**at(caution), "argmax": {name: plain[name] for name in kept_names}}


def average(values: list[Any]) -> Any:  # noqa: ANN401 - nested figures of one shape
    """Return the mean of nested figures; what is not known stays so."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: average([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [average(list(column)) for column in zip(*values, strict=True)]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def as_text(name: str, figures: Mapping[str, Any]) -> str:
    """Return one input's figures as a table for people."""
    note = ", case-control: precision and PR-AUC are optimistic" if figures["case_control"] else ""
    lines = [f"{name}{note}; interval coverage {figures['interval_coverage']:.3f}", COLUMNS]
    systems = {"ours": figures, **figures["experts"], "lightgbm": figures["baseline"]}
    for horizon in map(str, HORIZONS):
        lines += [_row(horizon, s, values["horizons"][horizon]) for s, values in systems.items()]
    return "\n".join(lines)


def degraded_as_text(name: str, figures: Mapping[str, Any]) -> str:
    """Return the figures of one input with a part of it gone as a table for people."""
    lines = [f"{name}, by the inputs that are left", COLUMNS]
    for horizon in map(str, HORIZONS):
        lines += [_row(horizon, v, values["horizons"][horizon]) for v, values in figures.items()]
    return "\n".join(lines)


def _row(horizon: str, system: str, figures: Mapping[str, Any]) -> str:
    lead, plain = figures["lead_hours"], figures["argmax"]
    shares = "  ".join(
        "  -  " if lead[key] is None else f"{lead[key]:5.3f}"
        for key in ("share_ge_36", "share_ge_40", "share_ge_44")
    )
    return (
        f"  {horizon:3s} {system:9s} {figures['macro_f1']:.4f} ({plain['macro_f1']:.4f})"
        f"    {figures['pr_auc']:.4f}  {figures['events_caught']:.3f}   {shares}"
        f"  {figures['false_alarms_per_machine_month']:.3f}"
        f" ({plain['false_alarms_per_machine_month']:.3f})"
    )
