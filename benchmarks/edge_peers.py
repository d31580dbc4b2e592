"""LightGBM on the inputs of an edge model, as ONNX: what a box would run without us.

One classifier a horizon, with the settings and the tuned caution of the evaluation's baseline;
what is judged is what ONNX Runtime says of the converted files, not LightGBM itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnxmltools.convert import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType

from apps.maintenance.edge.durable import write_whole
from apps.maintenance.features import hours_to_service
from apps.maintenance.fleet import Floats, Floats32, Ints
from apps.maintenance.inputs import COLUMNS, context_columns
from apps.maintenance.protocol import HORIZONS, Rows, hours_to_failure, labels, tune_caution
from apps.maintenance.splits import Part
from apps.maintenance.training.azure_runs import Stored, stored
from apps.maintenance.training.baseline import NUM_CLASSES, cross_fit_classes, fit_classes
from apps.maintenance.training.edge_report import Opinion, held_rows
from apps.maintenance.training.fit import CAUTIONS
from cluster.errors import ConfigurationError
from cluster.onnx import INPUT_NAME

LIGHTGBM = "lightgbm"
_CHUNK = 8192  # rows of one run


@dataclass(frozen=True, slots=True)
class OnnxTrees:
    """LightGBM's files of one part, fitted once and kept.

    Args:
        part: Rows and their split.
        period: Rhythm of the visits in hours, 0 for none.
        features: Names of the inputs.
        folder: Of the files.
        threads: Of LightGBM.
        say: Progress.
    """

    part: Part
    period: int
    features: tuple[str, ...]
    folder: Path
    threads: int
    say: Callable[[str], None]

    def opinion(self) -> Opinion:
        """Return what the files say of the rows of the test; they are made if they are not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.part
        columns = self._inputs(part.rows)
        hours = hours_to_failure(part.fleet.failures, part.rows, len(part.fleet.components))
        for horizon in HORIZONS:
            if not self._path(horizon).exists():
                train = part.train(horizon)
                self._write(horizon, columns[train], labels(hours, horizon)[train])

        def caution() -> Stored:
            chosen = []
            for horizon in HORIZONS:
                train, truth = part.train(horizon), labels(hours, horizon)
                machine, seen = part.rows.machine[train], columns[train]
                held = cross_fit_classes(seen, truth[train], machine, 0, self.threads)
                chosen.append(tune_caution(held, truth[train], CAUTIONS))
            self.say("LightGBM's cautions tuned")
            return {"caution": np.array(chosen)}

        kept = stored(self.folder / "caution.npz", caution)["caution"].astype(float)
        rows = self._inputs(held_rows(part))
        probs = np.stack([self._ask(session, rows) for session in self.sessions()], axis=1)
        return Opinion(probs, dict(zip(HORIZONS, kept.tolist(), strict=True)))

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(self._path(horizon).stat().st_size for horizon in HORIZONS)

    def sessions(self) -> list[onnxruntime.InferenceSession]:
        """Return the loaded files, one thread each."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return [onnxruntime.InferenceSession(self._path(horizon), options) for horizon in HORIZONS]

    def _inputs(self, rows: Rows) -> Floats32:
        """Return the columns of the edge model [N, D]."""
        fleet, period = self.part.fleet, self.period
        to_visit = hours_to_service(fleet.maintenance, rows, period)
        columns = context_columns(fleet, rows, to_visit, period)
        return columns[:, [COLUMNS.index(name) for name in self.features]]

    def _write(self, horizon: int, columns: Floats32, truth: Ints) -> None:
        if np.unique(truth).size != NUM_CLASSES:
            message = f"expected failures of every component to learn from at {horizon} h"
            raise ConfigurationError(message)
        booster = fit_classes(columns, truth, 0, self.threads)
        kind = [(INPUT_NAME, FloatTensorType([None, columns.shape[1]]))]
        model = convert_lightgbm(booster, initial_types=kind, zipmap=False)
        write_whole(self._path(horizon), model.SerializeToString())
        size = self._path(horizon).stat().st_size
        self.say(f"LightGBM for {horizon} h fitted, {size} bytes as ONNX")

    def _ask(self, session: onnxruntime.InferenceSession, rows: Floats32) -> Floats:
        """Return the probabilities of the classes [N, 1 + C]."""
        starts = range(0, rows.shape[0], _CHUNK)
        parts = [rows[first : first + _CHUNK] for first in starts]
        found = [session.run(["probabilities"], {INPUT_NAME: part})[0] for part in parts]
        return np.concatenate(found).astype(np.float64)

    def _path(self, horizon: int) -> Path:
        return self.folder / f"lightgbm-{horizon}h.onnx"
