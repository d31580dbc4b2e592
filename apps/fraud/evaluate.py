"""``trimoe fraud evaluate``: the published protocol, ours beside its baselines in one run.

Four test folds with every seed, four earlier validation folds with one.  Trees and the
mean of the two logits are judged on the same rows and features (``apps.fraud.report``).
Finished parts (fitted trees, example sets, runs) lie in the work folder and are reused.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import torch

from apps.fraud import chaining
from apps.fraud.protocol import TEST_STARTS, VALIDATION_STARTS, Fold
from apps.fraud.report import LOGITS, VALIDATION_SEED, Report, as_text, run_path
from apps.fraud.train import Dataset, Examples, Fit, fit_model, num_threads
from apps.fraud.transaction import TransactionSchema
from core_model.builtin_tasks import FRAUD
from core_model.training import TrainSettings, predict

HANDBOOK_ROWS = 1_754_155
TREES_AP = 0.736  # row "D, strict" of the published-protocol anchors
TREES_AP_TOLERANCE = 0.003
GPU_RUNS = 8  # side by side on one GPU; a step is bound by launches
PREPARERS = 4  # folds prepared side by side where there are cores for it
PARTS = ("train", "traffic", "test")


@dataclass(frozen=True, slots=True)
class Job:
    """One training and its predictions on the fold's test rows."""

    start: str
    seed: int
    device: str
    folder: Path

    @property
    def label(self) -> str:
        """What progress lines call it."""
        return f"fold {self.start} seed {self.seed}"


def save_examples(path: Path, examples: Examples) -> None:
    """Write examples; the file appears whole or not at all."""
    partial = path.with_name(f"partial-{path.name}")
    np.savez(partial, **{field.name: getattr(examples, field.name) for field in fields(Examples)})
    partial.rename(path)


def load_examples(path: Path) -> Examples:
    """Read what ``save_examples`` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return Examples(**{field.name: stored[field.name] for field in fields(Examples)})


def run(job: Job) -> None:
    """Train on a fold, predict its test rows, store outputs and expert load."""
    result = run_path(job.folder, job.start, job.seed)
    if result.exists():
        return
    torch.set_num_threads(1)  # runs side by side gain more than threads that wait for each other
    started = time.monotonic()
    train, traffic, test = (load_examples(part_path(job.folder, p, job.start)) for p in PARTS)
    model = fit_model(train, traffic, Fit(job.seed, job.device, job.label))
    outputs, load_LE = predict(model, FRAUD.name, test.batch(job.device))
    columns = [FRAUD.outputs.index(name) for name in LOGITS]
    partial = result.with_name(f"partial-{result.name}")
    np.savez(
        partial,
        outputs=outputs[:, columns].double().cpu().numpy(),
        load=load_LE.cpu().numpy(),
        seconds=time.monotonic() - started,
    )
    partial.rename(result)


def part_path(folder: Path, part: str, start: str) -> Path:
    """Return where a fold's example set lies."""
    return folder / f"{part}-{start}.npz"


def prepare(dataset: Dataset, fold: Fold, folder: Path) -> None:
    """Write a fold's example sets, unless they are there."""
    first, stop = fold.train_start(dataset.ledger.first_day), fold.train_end
    makers: Mapping[str, Callable[[], Examples]] = {
        "train": lambda: dataset.training_examples(first, stop, seed=0),
        "traffic": lambda: dataset.traffic_examples(first, stop, seed=0),
        "test": lambda: dataset.judged(
            fold.test_rows(dataset.ledger), dataset.ensemble(first, stop)
        ),
    }
    for part in PARTS:
        path = part_path(folder, part, fold.start)
        if not path.exists():
            save_examples(path, makers[part]())


def _jobs(start: str, args: argparse.Namespace, folder: Path) -> Iterator[Job]:
    seeds = range(args.seeds) if start in TEST_STARTS else (VALIDATION_SEED,)
    for seed in seeds:
        yield Job(start, seed, args.device, folder)


def run_all(dataset: Dataset, args: argparse.Namespace, folder: Path) -> None:
    """Prepare folds side by side and train each as it comes, a run per core or GPU slot."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", file=sys.stderr)

    workers = GPU_RUNS if args.device == "cuda" else num_threads()
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as trainers,
        ThreadPoolExecutor(min(PREPARERS, num_threads()), "prepare") as threads,
    ):
        folds = {
            threads.submit(prepare, dataset, Fold(start), folder): start
            for start in (*TEST_STARTS, *VALIDATION_STARTS)
        }
        futures: dict[Future[None], Job] = {}
        for prepared in as_completed(folds):
            prepared.result()
            say(f"fold {folds[prepared]} prepared")
            futures |= {trainers.submit(run, j): j for j in _jobs(folds[prepared], args, folder)}
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()
            say(f"{futures[future].label} done ({number}/{len(futures)})")


def _folder(args: argparse.Namespace) -> Path:
    """Return the folder of this data and these settings; another setting, another folder."""
    facts = [TrainSettings(), args.data.stat().st_size, args.device, chaining.BOOSTER_PARAMETERS]
    facts += [chaining.NUM_TREES, chaining.HARD_LOGIT, chaining.EASY_SHARE, chaining.STEP_DAYS]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    work = args.work or Path(gettempdir()) / "trimoe-fraud-evaluate"
    folder: Path = work / digest
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(args: argparse.Namespace) -> int:
    """Run the protocol, print and store the figures; fail if the baseline is not the known one."""
    started = time.monotonic()
    table = TransactionSchema().read_table(args.data)
    folder = _folder(args)
    dataset = Dataset(table, folder, max(1, num_threads() // PREPARERS))
    run_all(dataset, args, folder)
    figures = Report(dataset.ledger, folder, args.seeds).figures()
    figures |= {"seconds": round(time.monotonic() - started, 1), "device": args.device}
    print(as_text(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    trees_ap = figures["baseline"]["trees"]["ap"]
    if len(table) == HANDBOOK_ROWS and abs(trees_ap - TREES_AP) > TREES_AP_TOLERANCE:
        print(
            f"the trees must reach AP {TREES_AP} +- {TREES_AP_TOLERANCE}, got {trees_ap:.4f}",
            file=sys.stderr,
        )
        return 1
    return 0
