"""Training of the fraud task: tree expert, then sequence experts and gate.

``python -m apps.cli fraud train --simulate --out models/fraud`` makes the weights that
ship.  Of the applications' modules only this one and ``evaluate`` know ``core_model``.

Legend: N rows of the table, M training rows, C context features.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from apps.fraud.chaining import fit_trees, keep_shares, plan
from apps.fraud.offline import HistoryIndex, offline_context
from apps.fraud.protocol import DAY_MS, HISTORY_DAYS, WARM_UP_DAYS, Ledger
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.transaction import TransactionSchema
from core_model.balance import utilisation
from core_model.builtin_tasks import FRAUD, NUM_CONTEXT
from core_model.checkpoint import save_checkpoint
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.tabular import TabularAdapter
from core_model.training import (
    Loss,
    TrainSettings,
    WeightedSample,
    predict,
    rebalance_task,
    train_task,
)
from core_model.trees import ensemble_from_xgboost
from kernels.trees import TreeEnsemble, tree_ensemble

Ints = NDArray[np.int64]
Floats32 = NDArray[np.float32]
TRAFFIC_DAYS = 14  # two whole weeks: the load of a weekday is not that of a Sunday
TRAFFIC_ROWS = 24_000
CHUNK = 20_000  # rows of the tree expert at once
LOGIT = FRAUD.outputs.index("logit")
SEQUENCE_LOGIT = FRAUD.outputs.index("sequence_logit")


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows ready for the model; plain arrays, so that they travel to other processes.

    Args:
        rows: Rows of the table [M].
        history: float32 [R, D]; offsets int32 [M+1].
        context: float32 [M, C].
        tree: Tree logit (NaN = withheld) and contributions, float32 [M, 1 + C].
        fraud: float32 [M].
        weight: How many rows of traffic each stands for, float32 [M].
    """

    rows: Ints
    history: Floats32
    offsets: NDArray[np.int32]
    context: Floats32
    tree: Floats32
    fraud: Floats32
    weight: Floats32

    def batch(self, device: str) -> RaggedBatch:
        """Return them as one packed batch on a device."""
        extras = {"context": _tensor(self.context, device), "tree": _tensor(self.tree, device)}
        return RaggedBatch(_tensor(self.history, device), _tensor(self.offsets, device), extras)


def _tensor(array: NDArray[np.generic], device: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


class Dataset:
    """A table with its offline features, its folder of fitted trees and its sampling seed."""

    def __init__(self, table: pd.DataFrame, trees: Path, threads: int) -> None:
        self.ledger = Ledger(
            day=table["time_ms"].to_numpy() // DAY_MS,
            card=table["card"].cat.codes.to_numpy().astype(np.int64),
            fraud=table["TX_FRAUD"].to_numpy() == 1,
        )
        self._wide = offline_context(table)
        self.context: Floats32 = self._wide.astype(np.float32)
        self._history = HistoryIndex(table)
        self._trees = trees
        self._threads = threads
        self._fitting: defaultdict[Path, Lock] = defaultdict(Lock)
        trees.mkdir(parents=True, exist_ok=True)

    @property
    def training_days(self) -> tuple[int, int]:
        """First day to train on, and the day after the last: all but the last two weeks."""
        stop = int(self.ledger.day.max()) - 13
        return max(self.ledger.first_day + WARM_UP_DAYS, stop - HISTORY_DAYS), stop

    @property
    def unlabelled(self) -> Ints:
        """Rows of the week of label delay: nothing is learnt from them."""
        first = self.training_days[1]
        return np.flatnonzero((self.ledger.day >= first) & (self.ledger.day < first + 7))

    @property
    def held_out(self) -> Ints:
        """Rows to report on: the last week; before it lies a week of label delay."""
        return np.flatnonzero(self.ledger.day >= self.training_days[1] + 7)

    def ensemble(self, start: int, end: int) -> TreeEnsemble:
        """Return the trees fitted on the days [start, end); threads wait for one another's."""
        days = (self.ledger.day >= start) & (self.ledger.day < end)
        path = self._trees / f"trees-{start}-{end}.json"
        with self._fitting[path]:
            fit_trees(self.context, self.ledger.fraud, days, path, self._threads)
        return ensemble_from_xgboost(json.loads(path.read_text("utf-8")), NUM_CONTEXT)

    def tree_answers(self, ensemble: TreeEnsemble, rows: Ints) -> Floats32:
        """Return logit and contributions [M, 1 + C]."""
        parts = []
        for start in range(0, rows.size, CHUNK):
            context = torch.from_numpy(self.context[rows[start : start + CHUNK]])
            logit, contributions = tree_ensemble(context, ensemble)
            parts.append(torch.cat([logit[:, None], contributions], dim=1))
        return torch.cat(parts).numpy()

    def examples(self, rows: Ints, tree: Floats32, weight: Floats32) -> Examples:
        """Return these rows of the table, with tree answers and weights, ready for the model."""
        features = self._history.features(rows, self._wide)
        return Examples(
            rows=rows,
            history=features.history,
            offsets=features.cu_seqlens,
            context=self.context[rows],
            tree=tree,
            fraud=self.ledger.fraud[rows].astype(np.float32),
            weight=weight,
        )

    def training_examples(self, start: int, stop: int, seed: int) -> Examples:
        """Return sampled rows of the days [start, stop) with forward-chained tree answers."""
        generator = np.random.default_rng(seed)
        rows, trees, weights = [], [], []
        day = self.ledger.day
        for number, link in enumerate(plan(start, stop)):
            first = start if number == 0 else link.first  # the first link also ranks earlier days
            span = np.flatnonzero((day >= first) & (day < link.last))
            answers = self.tree_answers(self.ensemble(link.start, link.fit_end), span)
            share = keep_shares(answers[:, 0], self.ledger.fraud[span])
            answers[day[span] < link.first] = np.nan  # not out of sample: never shown
            kept = generator.random(span.size) < share
            rows.append(span[kept])
            trees.append(answers[kept])
            weights.append(1.0 / share[kept])
        joined = np.concatenate(weights).astype(np.float32)
        return self.examples(np.concatenate(rows), np.concatenate(trees), joined)

    def traffic_examples(self, start: int, stop: int, seed: int) -> Examples:
        """Return rows of the last training days as they come, with the served trees' answers."""
        generator = np.random.default_rng(seed)
        day = self.ledger.day
        days = np.flatnonzero((day >= stop - TRAFFIC_DAYS) & (day < stop))
        rows = np.sort(generator.permutation(days)[:TRAFFIC_ROWS])
        return self.judged(rows, self.ensemble(start, stop))

    def judged(self, rows: Ints, ensemble: TreeEnsemble) -> Examples:
        """Return rows with the answers of one ensemble and equal weights."""
        answers = self.tree_answers(ensemble, rows)
        return self.examples(rows, answers, np.ones(rows.size, np.float32))


@dataclass(frozen=True, slots=True)
class Fit:
    """How one model is to be trained."""

    seed: int
    device: str
    label: str
    settings: TrainSettings = field(default_factory=TrainSettings)
    preset: str = "base"


def loss_of(examples: Examples, device: str) -> Loss:
    """Return the weighted cross entropy of the gated logit and of the sequence experts alone."""
    fraud_B, weight_B = _tensor(examples.fraud, device), _tensor(examples.weight, device)

    def loss(outputs: Tensor, chosen: Tensor) -> Tensor:
        weight = weight_B[chosen] / weight_B[chosen].sum()
        entropies = [
            functional.binary_cross_entropy_with_logits(
                outputs[:, column], fraud_B[chosen], weight=weight, reduction="sum"
            )
            for column in (LOGIT, SEQUENCE_LOGIT)
        ]
        return torch.stack(entropies).sum()

    return loss


def fit_model(examples: Examples, traffic: Examples, fit: Fit) -> MoETransformer:
    """Train sequence experts and gate, then balance the experts on the traffic.

    The trees are still to be installed.
    """
    device = fit.device
    torch.manual_seed(fit.seed)
    model = MoETransformer(PRESETS[fit.preset], [FRAUD.name]).to(device)
    batch = examples.batch(device)
    adapter = model.adapters[FRAUD.name]
    if isinstance(adapter, TabularAdapter):
        adapter.fit_scaling(batch.extras["context"])

    def progress(step: int, steps: int, value: float) -> None:
        print(f"\r{fit.label}: step {step}/{steps}, loss {value:.4f}", end="", file=sys.stderr)

    sample = WeightedSample(FRAUD.name, batch, _tensor(examples.weight, device))
    train_task(model, sample, loss_of(examples, device), fit.settings, fit.seed, progress)
    rebalance_task(model, FRAUD.name, traffic.batch(device))
    print(file=sys.stderr)
    return model


def num_threads() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0))


def _source(args: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """Return the table and where it comes from, in words for the manifest."""
    if args.simulate:
        config = SimulationConfig(seed=args.seed)
        return simulate(config), f"generated by apps/fraud/simulate.py, {config}"
    return TransactionSchema().read_table(args.data), f"file {args.data.name}"


def main(args: argparse.Namespace) -> int:
    """Train on all but the last three weeks, report on the last, save the checkpoint."""
    started = time.monotonic()
    table, source = _source(args)
    work = args.work or args.out / "work"
    dataset = Dataset(table, work, num_threads())
    start, stop = dataset.training_days
    examples = dataset.training_examples(start, stop, args.seed)
    traffic = dataset.traffic_examples(start, stop, args.seed)
    model = fit_model(examples, traffic, Fit(args.seed, args.device, "fraud"))
    ensemble = dataset.ensemble(start, stop)
    test = dataset.judged(dataset.held_out, ensemble)
    outputs, load_LE = predict(model, FRAUD.name, test.batch(args.device))
    figures = _figures(outputs.cpu().numpy(), test.fraud > 0)
    figures["utilisation_min"] = float(utilisation(load_LE).min())
    adapter = model.cpu().adapters[FRAUD.name]
    if isinstance(adapter, TabularAdapter):
        adapter.set_ensemble(ensemble)
    flag = "--simulate" if args.simulate else f"--data {args.data.name}"
    command = f"trimoe fraud train {flag} --seed {args.seed} --out {_as_given(args.out)}"
    manifest = save_checkpoint(
        args.out,
        model,
        version=f"fraud-{args.seed + 1}",
        data=source,
        metrics=figures,
        command=command,
    )
    figures["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps({"version": manifest.version, **figures}))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _as_given(path: Path) -> str:
    """Return a path for a manifest; of an absolute one, which is a machine's own, the name."""
    return path.name if path.is_absolute() else path.as_posix()


def _figures(outputs: NDArray[np.float32], fraud: NDArray[np.bool_]) -> dict[str, float]:
    from sklearn.metrics import average_precision_score  # noqa: PLC0415 - only here

    columns = {
        "ap": LOGIT,
        "ap_trees": FRAUD.outputs.index("tree_logit"),
        "ap_sequence": SEQUENCE_LOGIT,
    }
    return {
        name: round(float(average_precision_score(fraud, outputs[:, column])), 4)
        for name, column in columns.items()
    }
