"""Figures of the C-MAPSS evaluation from stored runs, ours beside LightGBM on the same units.

A forecast of several seeds is the mean of theirs, for both.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from apps.maintenance.cmapss import CAP_CYCLES, figures
from apps.maintenance.fleet import Floats
from apps.maintenance.intervals import covered
from apps.maintenance.training.azure_runs import nothing, stored
from apps.maintenance.training.cmapss_runs import NUM_LIVES, LifeRuns, with_excess

EXPERTS = ("ours", "trees", "sequence")  # in the order of the output columns


def life_figures(runs: LifeRuns, num_seeds: int) -> dict[str, Any]:
    """Return everything the JSON file holds."""
    truth = stored(runs.path("truth"), nothing)["truth"].astype(np.float64)
    chosen = runs.calibration()
    excess, margin = float(chosen["excess"]), float(chosen["margin"])
    outputs = [
        stored(runs.path(f"ours-{seed}"), nothing)["outputs"].astype(np.float64)
        for seed in range(num_seeds)
    ]
    baseline = [
        stored(runs.path(f"baseline-{seed}"), nothing)["life"].astype(np.float64)
        for seed in range(num_seeds)
    ]
    together = np.mean(outputs, axis=0)

    def judge(columns: Floats, expert: int = 0) -> dict[str, float]:
        lives = columns[:, expert * NUM_LIVES : (expert + 1) * NUM_LIVES]
        return figures(with_excess(lives, excess), np.minimum(lives[:, 0], CAP_CYCLES), truth)

    def judge_baseline(life: Floats) -> dict[str, float]:
        return figures(life, life, truth)

    early = np.minimum(truth, CAP_CYCLES)
    quantiles = together[:, len(EXPERTS) * NUM_LIVES :]
    ours, other = judge(together), judge_baseline(np.mean(baseline, axis=0))
    return {
        "subset": runs.subset,
        **ours,
        "baseline": other,
        "reduction": {name: 1.0 - ours[name] / other[name] for name in ours},
        "interval_coverage": float(covered(quantiles, early, margin, CAP_CYCLES).mean()),
        "experts": {name: judge(together, i) for i, name in enumerate(EXPERTS) if i},
        "excess_share": excess,
        "seeds": [
            {"seed": seed, **judge(own), "baseline": judge_baseline(theirs)}
            for seed, (own, theirs) in enumerate(zip(outputs, baseline, strict=True))
        ],
    }


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
