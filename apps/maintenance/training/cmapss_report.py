"""Figures of the C-MAPSS evaluation from stored runs, ours beside LightGBM on the same units.

Figures of several seeds are the means of each seed's own, for both.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from apps.maintenance.cmapss import CAP_CYCLES, figures
from apps.maintenance.fleet import Floats
from apps.maintenance.intervals import covered, widened
from apps.maintenance.training.azure_report import average
from apps.maintenance.training.azure_runs import nothing, stored
from apps.maintenance.training.cmapss_runs import LifeRuns
from apps.maintenance.training.life_choice import with_excess
from apps.maintenance.training.life_fit import NUM_LIVES

TREES = slice(NUM_LIVES, 2 * NUM_LIVES)  # of the task's output columns
SEQUENCE = slice(2 * NUM_LIVES, 3 * NUM_LIVES)
SPREAD = slice(3 * NUM_LIVES, None)


def life_figures(runs: LifeRuns, num_seeds: int) -> dict[str, Any]:
    """Return everything the JSON file holds; the means are of each seed's own figures."""
    truth = stored(runs.path("truth"), nothing)["truth"].astype(np.float64)
    choice = runs.choice()
    outputs = [_columns(runs, f"ours-{seed}", "outputs") for seed in range(num_seeds)]
    baseline = [_columns(runs, f"baseline-{seed}", "life") for seed in range(num_seeds)]

    def judge(columns: Floats, share: Floats) -> dict[str, float]:
        tree, sequence = columns[:, TREES], columns[:, SEQUENCE]
        lives = tree + share * (sequence - tree)
        early_life = np.minimum(lives[:, 0], CAP_CYCLES)
        return figures(with_excess(lives, choice.excess), early_life, truth)

    def coverage(columns: Floats) -> float:
        quantiles = widened(columns[:, SPREAD], choice.margins, CAP_CYCLES)
        return float(covered(quantiles, truth, 0.0, CAP_CYCLES).mean())

    seeds = [
        {
            **judge(own, choice.share),
            "interval_coverage": coverage(own),
            "baseline": figures(theirs, theirs, truth),
            "experts": {
                "trees": judge(own, np.zeros(NUM_LIVES)),
                "sequence": judge(own, np.ones(NUM_LIVES)),
            },
        }
        for own, theirs in zip(outputs, baseline, strict=True)
    ]
    means = average(seeds)
    other = means["baseline"]
    return {
        "subset": runs.subset,
        **means,
        "reduction": {name: 1.0 - means[name] / other[name] for name in other},
        "chosen": {
            "sequence_share": choice.share.tolist(),
            "excess_share": choice.excess,
            "interval_margins": choice.margins.tolist(),
        },
        "seeds": [{"seed": seed, **values} for seed, values in enumerate(seeds)],
    }


def _columns(runs: LifeRuns, what: str, name: str) -> Floats:
    return stored(runs.path(what), nothing)[name].astype(np.float64)


def as_text(found: Mapping[str, Any]) -> str:
    """Return the figures as a table for people."""
    systems = {"ours": found, **found["experts"], "lightgbm": found["baseline"]}
    lines = [
        f"{found['subset']}; interval coverage {found['interval_coverage']:.3f}",
        "  system     RMSE   score    RMSE   score",
        "             test RUL as it is   capped at 125",
    ]
    names = ("rmse", "score", "rmse_capped", "score_capped")
    for system, values in systems.items():
        rmse, score, rmse_capped, score_capped = (values[name] for name in names)
        lines.append(
            f"  {system:9s} {rmse:6.2f} {score:7.1f}   {rmse_capped:6.2f} {score_capped:7.1f}"
        )
    less = "  ".join(f"{name} {found['reduction'][name]:.1%}" for name in names)
    lines.append(f"  less than LightGBM: {less}")
    return "\n".join(lines)
