"""The figures of ``trimoe fraud evaluate`` from stored runs: ours beside its baselines.

Thresholds and weights are chosen on the validation folds alone; what they lead to on the
test folds is printed beside the best that any threshold could have done.  Numpy only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apps.fraud.protocol import (
    RECALLS,
    TEST_STARTS,
    VALIDATION_STARTS,
    Floats,
    Fold,
    Ledger,
    TestSet,
    bootstrap_reduction,
    metrics,
    summarise,
    threshold_at,
)

VALIDATION_SEED = 0  # one seed chooses; the test folds are run with every seed
MEAN_WEIGHTS: tuple[float, ...] = tuple(np.arange(0.05, 1.0, 0.05).round(2).tolist())
REALISED_RECALL = 0.6
DRAWS = 200
SYSTEMS = ("ours", "trees", "fixed_mean", "sequence")
LOGITS = ("logit", "tree_logit", "sequence_logit")  # columns of a stored run


class StoredRun(NamedTuple):
    """What a run left behind.

    Args:
        scores: Logits of the gated model, the trees and the sequence experts, by ``LOGITS``.
        load: Tokens of each layer's experts on the test rows [L, E].
    """

    scores: Mapping[str, Floats]
    load: NDArray[np.float64]


def run_path(folder: Path, start: str, seed: int) -> Path:
    """Return where the run of a fold and seed lies."""
    return folder / f"run-{start}-{seed}.npz"


def load_run(folder: Path, start: str, seed: int) -> StoredRun:
    """Read a finished run."""
    with np.load(run_path(folder, start, seed), allow_pickle=False) as stored:
        outputs, load = stored["outputs"], stored["load"]
    return StoredRun({name: outputs[:, i] for i, name in enumerate(LOGITS)}, load)


def fixed_mean(scores: Mapping[str, Floats], weight: float) -> Floats:
    """Return the mean of tree and sequence logit, ``weight`` on the latter."""
    return (1.0 - weight) * scores["tree_logit"] + weight * scores["sequence_logit"]


def choose_weight(validation: list[tuple[Mapping[str, Floats], NDArray[np.bool_]]]) -> float:
    """Return the weight of the sequence logit with the best mean AP on validation folds."""
    from sklearn.metrics import average_precision_score  # noqa: PLC0415 - only here

    def quality(weight: float) -> float:
        precisions = [average_precision_score(f, fixed_mean(s, weight)) for s, f in validation]
        return float(np.mean(precisions))

    return max(MEAN_WEIGHTS, key=quality)


class Report:
    """Turns stored runs into the figures of the JSON file."""

    def __init__(self, ledger: Ledger, folder: Path, num_seeds: int) -> None:
        self.ledger, self.folder, self.num_seeds = ledger, folder, num_seeds
        self.rows = {s: Fold(s).test_rows(ledger) for s in (*TEST_STARTS, *VALIDATION_STARTS)}
        validation = [
            (load_run(folder, s, VALIDATION_SEED).scores, ledger.fraud[self.rows[s]])
            for s in VALIDATION_STARTS
        ]
        self.weight = choose_weight(validation)
        self.threshold = threshold_at(
            np.concatenate([scores["logit"] for scores, _ in validation]),
            np.concatenate([fraud for _, fraud in validation]),
            REALISED_RECALL,
        )

    def figures(self) -> dict[str, Any]:
        """Return everything the JSON file holds, means over seeds first."""
        seeds = [self._seed_figures(seed) for seed in range(self.num_seeds)]
        mean = {name: _average([s["summary"][name] for s in seeds]) for name in SYSTEMS}
        return {
            **mean["ours"],
            "realised": {
                "recall_aimed_at": REALISED_RECALL,
                **_average([s["realised"] for s in seeds]),
            },
            "per_fold": [self._fold_figures(i, seeds) for i in range(len(TEST_STARTS))],
            "seeds": [{"seed": i, **seed} for i, seed in enumerate(seeds)],
            "baseline": {name: mean[name] for name in SYSTEMS[1:]},
            "fixed_mean_weight": self.weight,
            "dead_experts": sum(
                int((load == 0).sum()) for start in TEST_STARTS for load in self._loads(start)
            ),
        }

    def _test_set(self, start: str, seed: int) -> TestSet:
        """Return the scores of every system on one test fold."""
        scores = load_run(self.folder, start, seed).scores
        systems = {
            "ours": scores["logit"],
            "trees": scores["tree_logit"],
            "fixed_mean": fixed_mean(scores, self.weight),
            "sequence": scores["sequence_logit"],
        }
        return TestSet(self.ledger, self.rows[start], systems)

    def _seed_figures(self, seed: int) -> dict[str, Any]:
        """Return what one seed reaches over the test folds."""
        sets = [self._test_set(start, seed) for start in TEST_STARTS]
        per_system = {
            name: [metrics(s.scores[name], self.ledger, s.rows) for s in sets] for name in SYSTEMS
        }
        return {
            "summary": {name: summarise(folds) for name, folds in per_system.items()},
            "folds": per_system,
            "realised": self._realised(sets),
            "reduction_95": {
                other: bootstrap_reduction(sets, "ours", other, draws=DRAWS, seed=seed)
                for other in ("trees", "fixed_mean")
            },
        }

    def _realised(self, sets: list[TestSet]) -> dict[str, float]:
        """False positives and recall at the threshold chosen on validation folds."""
        false, caught, frauds = 0, 0, 0
        for fold in sets:
            fraud = self.ledger.fraud[fold.rows]
            flagged = fold.scores["ours"] >= self.threshold
            false += int((flagged & ~fraud).sum())
            caught += int((flagged & fraud).sum())
            frauds += int(fraud.sum())
        return {"threshold": self.threshold, "fp": float(false), "recall": caught / frauds}

    def _loads(self, start: str) -> list[NDArray[np.float64]]:
        return [load_run(self.folder, start, seed).load for seed in range(self.num_seeds)]

    def _fold_figures(self, index: int, seeds: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one test fold's size, means over seeds, and mean / max load per layer."""
        start = TEST_STARTS[index]
        fraud = self.ledger.fraud[self.rows[start]]
        used = np.mean(
            [load.mean(axis=1) / load.max(axis=1) for load in self._loads(start)], axis=0
        )
        return {
            "start": start,
            "rows": int(fraud.size),
            "frauds": int(fraud.sum()),
            **{n: _average([s["folds"][n][index] for s in seeds]) for n in SYSTEMS},
            "utilisation": used.round(4).tolist(),
        }


def _average(dicts: list[Any]) -> Any:  # noqa: ANN401 - nested figures of one shape
    first = dicts[0]
    if isinstance(first, Mapping):
        return {key: _average([d[key] for d in dicts]) for key in first}
    return float(np.mean(dicts))


def _row(name: str, figures: Mapping[str, Any]) -> str:
    fp = figures["fp_at_recall"]
    counts = "  ".join(f"{fp[str(r)]:7.1f}" for r in RECALLS)
    return f"{name:12s} {figures['auc']:.4f}  {figures['ap']:.4f}  {figures['cp100']:.4f}  {counts}"


def as_text(figures: Mapping[str, Any]) -> str:
    """Return the figures as a table for people."""
    realised = figures["realised"]
    realised_line = (
        f"at the validation threshold {realised['threshold']:.3f} (logit, aimed at recall "
        f"{REALISED_RECALL}): {realised['fp']:.1f} false positives, recall {realised['recall']:.3f}; "
        f"the test folds' own threshold: {figures['fp_at_recall'][str(REALISED_RECALL)]:.1f}"
    )
    lines = [
        "system       AUC     AP      CP@100  FP@.5    FP@.6    FP@.65   FP@.7",
        _row("ours", figures),
        *(_row(name, values) for name, values in figures["baseline"].items()),
        realised_line,
    ]
    for fold in figures["per_fold"]:
        counts = ", ".join(
            f"{name} {fold[name]['fp@0.6'] + fold[name]['fp@0.65']:.1f}" for name in SYSTEMS[:3]
        )
        lines.append(
            f"fold {fold['start']}: FP@.6 + FP@.65 {counts}; utilisation {fold['utilisation']}"
        )
    for seed in figures["seeds"]:
        low, high = seed["reduction_95"]["trees"]
        lines.append(
            f"seed {seed['seed']}: fewer false positives than the trees, 95 % by card: "
            f"{low:.3f} .. {high:.3f}"
        )
    return "\n".join(lines)
