"""What the fraud application brings to joint training (see ``apps.joint.Lesson``)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from apps.fraud.train import LOGIT, Dataset, Examples, loss_of, num_threads
from core_model.builtin_tasks import FRAUD
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.tabular import TabularAdapter
from core_model.training import (
    SampleSource,
    TrainSettings,
    WeightedSample,
    device_of,
    in_parts,
    predict,
)
from kernels.trees import TreeEnsemble

SETTINGS = TrainSettings()


@dataclass(frozen=True, slots=True)
class FraudLesson:
    """Transactions, the last week held out.

    Args:
        data: Where they come from, in words.
        examples: Sampled rows to train on, with forward-chained answers of the trees.
        recent: Rows of the last training days as they came.
        unlabelled: Rows of the week whose labels had not come yet.
        test: Rows of the last week.
        ensemble: The trees that are served; None leaves the tree expert out.
    """

    data: str
    examples: Examples
    recent: Examples
    unlabelled: Examples
    test: Examples
    ensemble: TreeEnsemble | None

    @classmethod
    def of(cls, table: pd.DataFrame, data: str, work: Path, seed: int) -> Self:
        """Prepare transactions with labels.

        Args:
            table: As ``apps.fraud.simulate`` gives it.
            data: Where it comes from, in words.
            work: Folder of fitted trees, which are reused.
            seed: Of the sample.
        """
        dataset = Dataset(table, work, num_threads())
        start, stop = dataset.training_days
        ensemble = dataset.ensemble(start, stop)
        examples = dataset.training_examples(start, stop, seed)
        recent = dataset.traffic_examples(start, stop, seed)
        unlabelled, test = (
            dataset.judged(rows, ensemble) for rows in (dataset.unlabelled, dataset.held_out)
        )
        return cls(data, examples, recent, unlabelled, test, ensemble)

    @property
    def task(self) -> str:
        """Fraud."""
        return FRAUD.name

    def without_trees(self) -> Self:
        """Return the same without the tree expert."""
        return replace(
            self,
            examples=_blind(self.examples),
            recent=_blind(self.recent),
            unlabelled=_blind(self.unlabelled),
            test=_blind(self.test),
            ensemble=None,
        )

    def source(self, device: str, seed: int) -> SampleSource:
        """Return its draws."""
        batch = self.examples.batch(device)
        weights = batch.features.new_tensor(self.examples.weight)
        return SampleSource(
            WeightedSample(FRAUD.name, batch, weights),
            loss_of(self.examples, device),
            SETTINGS.batch_size,
            seed,
            SETTINGS.peak_lr,
            SETTINGS.weight_decay,
        )

    def prepare(self, model: MoETransformer) -> None:
        """Take the scale of the context features."""
        context = self.examples.batch(device_of(model)).extras["context"]
        _adapter(model).fit_scaling(context)

    def traffic(self, device: str) -> Iterator[RaggedBatch]:
        """Yield transactions of the last training days as they came."""
        return in_parts(self.recent.batch(device))

    def held_out(self, device: str) -> Iterator[RaggedBatch]:
        """Yield the last two weeks."""
        return chain.from_iterable(
            in_parts(each.batch(device)) for each in (self.unlabelled, self.test)
        )

    def finish(self, model: MoETransformer, folder: Path) -> None:
        """Put the trees into the model."""
        if self.ensemble is not None:
            _adapter(model).set_ensemble(self.ensemble)

    def measure(self, model: MoETransformer) -> dict[str, float]:
        """Return the average precision on the last week."""
        from sklearn.metrics import average_precision_score  # noqa: PLC0415 - only here

        outputs, _ = predict(model, FRAUD.name, self.test.batch(device_of(model)))
        score = average_precision_score(self.test.fraud > 0, outputs[:, LOGIT].cpu().numpy())
        return {"ap": float(score)}


def _blind(examples: Examples) -> Examples:
    """Return examples with the trees' answers withheld."""
    return replace(examples, tree=np.full_like(examples.tree, np.nan))


def _adapter(model: MoETransformer) -> TabularAdapter:
    adapter = model.adapters[FRAUD.name]
    if not isinstance(adapter, TabularAdapter):
        message = f"expected a model of {FRAUD.name}, got {type(adapter).__name__}"
        raise TypeError(message)
    return adapter
