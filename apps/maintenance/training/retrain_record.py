"""What a retraining learns from: which hours of the record, and what it says of them afterwards.

The plant that a model meets today may not be the one of a year ago.  If the newest weeks have
drifted from the training of the deployed model, the weeks since the drift are learned from once
enough has failed in them; until then, and without a drift, the whole record is.

Legend: N windows, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np

from apps.maintenance.edge.bundle import GOLDEN, MODEL, BundleInfo, pack, read_info
from apps.maintenance.edge.drift import watched_columns
from apps.maintenance.edge.forecast import Forecaster
from apps.maintenance.edge.spread import DRIFTED, HAZARD, LIFE, Values, steady_spreads
from apps.maintenance.features import hours_to_service, service_period
from apps.maintenance.fleet import Fleet, Floats32, Ints, Records
from apps.maintenance.inputs import COLUMNS, context_columns
from apps.maintenance.protocol import ROW_STEP, Rows, grid_rows
from apps.maintenance.splits import Part
from apps.maintenance.sync.evidence import HOUR_S, start_of
from apps.maintenance.sync.shadow import History
from apps.maintenance.training.train import training_part
from cluster.errors import ConfigurationError

WEEK_HOURS = 168
NUM_QUARTERS = 4
MAX_WINDOWS = 256  # of one request, as an agent sends them
LEAST_FAILURES = 150  # since a drift; of 61, 125, 191, 359 macro F1 at 48 h was .63, .68, .70, .70


@dataclass(frozen=True, slots=True)
class Span:
    """Hours of a record.

    Args:
        first: The first of them.
        last: The first that is not.
    """

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Drift:
    """The newest weeks of a record that are unlike the training of the deployed model.

    Args:
        first: Hour in which they begin; the end of the record if there are none.
        num_failures: In them.
        last: End of the record.
    """

    first: int
    num_failures: int
    last: int

    @property
    def is_unlabelled(self) -> bool:
        """Whether there are such weeks, and too little has failed in them to learn from."""
        return self.first < self.last and self.num_failures < LEAST_FAILURES

    @property
    def span(self) -> Span:
        """Return the hours to learn from."""
        is_new = self.first < self.last and not self.is_unlabelled
        return Span(self.first if is_new else 0, self.last)


def find_drift(record: Fleet, info: BundleInfo) -> Drift:
    """Return the newest weeks that are unlike what the deployed model was trained on."""
    rows = grid_rows(record)
    columns = named_columns(record, rows)
    names = [name for name in info.reference if name in columns]
    week = (rows.hour.max() - rows.hour) // WEEK_HOURS
    first = record.num_hours
    for number in range(int(week.max()) + 1):
        inside = week == number
        psis = [
            info.reference[name].psi(info.reference[name].count(columns[name][inside]))
            for name in names
        ]
        if max(psis, default=0.0) <= DRIFTED:
            break
        first = int(rows.hour[inside].min())
    num_failures = int((record.failures.hour >= first).sum())
    return Drift(first, num_failures, record.num_hours)


def cut(record: Fleet, span: Span) -> Fleet:
    """Return what was known at the end of a span; what happened before it keeps its distance."""
    return replace(
        record,
        start=record.start + timedelta(hours=span.first),
        num_hours=span.last - span.first,
        telemetry=record.telemetry[:, span.first : span.last],
        errors=_within(record.errors, span),
        failures=_within(record.failures, span),
        maintenance=_within(record.maintenance, span),
    )


def named_columns(fleet: Fleet, rows: Rows) -> Mapping[str, Values]:
    """Return what an edge model may read, [N] by name.

    Raises:
        ConfigurationError: The fleet has more or fewer kinds of something than the model.
    """
    context = _context(fleet, rows)
    if context.shape[1] != len(COLUMNS):
        message = (
            "record: expected 4 components, 4 sensors and 5 errors, got "
            f"{len(fleet.components)}, {len(fleet.sensors)} and {len(fleet.error_names)}"
        )
        raise ConfigurationError(message)
    return dict(zip(COLUMNS, context.T, strict=True))


def held_out(part: Part, horizon_h: int) -> History:
    """Return the windows of a part's test, and the failures that could be caught in them."""
    rows = part.rows.take(part.test(horizon_h))
    events = part.events(horizon_h)
    return History(
        features=_context(part.fleet, rows),
        names=COLUMNS,
        machine=rows.machine,
        hour=rows.hour,
        failure_machine=events.machine,
        failure_hour=events.hour,
        step_h=ROW_STEP,
    )


def pack_edge(folder: Path, version: int, record: Fleet) -> bytes:
    """Return an edge model as a bundle that says how its training was spread.

    Args:
        folder: Holds ``bundle.json``, ``golden.npz`` and ``model.onnx``.
        version: Of the bundle.
        record: That it was trained on, with its held-out end.
    """
    part = training_part(record)
    info = read_info(folder)
    learned = part.rows.take(part.train(0))
    columns = named_columns(record, learned)
    inputs = {name: columns[name] for name in info.features}
    reference = {
        **steady_spreads(inputs, _parts(learned)),
        **steady_spreads(_forecasts(folder, part), _parts(_tested(part))),
    }
    trained_until = start_of(record) + record.num_hours * HOUR_S
    info = replace(info, version=version, reference=reference, trained_until=trained_until)
    return pack(info, (folder / GOLDEN).read_bytes(), (folder / MODEL).read_bytes())


def _forecasts(folder: Path, part: Part) -> Mapping[str, Values]:
    """Return what a bundle says of windows it has not learned from."""
    forecaster = Forecaster(folder)
    names = forecaster.info.features
    columns = named_columns(part.fleet, _tested(part))
    features: Floats32 = np.stack([columns[name] for name in names], axis=1).astype(np.float32)
    found = [
        watched_columns(names, asked, forecaster.forecast(asked))
        for asked in np.array_split(features, -(-len(features) // MAX_WINDOWS))
    ]
    return {name: np.concatenate([each[name] for each in found]) for name in (HAZARD, LIFE)}


def _parts(rows: Rows) -> Ints:
    """Return the part of the record of each row: a week of a quarter of the machines."""
    return rows.hour // WEEK_HOURS * NUM_QUARTERS + rows.machine % NUM_QUARTERS


def _tested(part: Part) -> Rows:
    return part.rows.take(part.test(0))


def _context(fleet: Fleet, rows: Rows) -> Floats32:
    period = service_period(fleet.maintenance)
    to_visit = hours_to_service(fleet.maintenance, rows, period)
    return context_columns(fleet, rows, to_visit, period)


def _within(records: Records, span: Span) -> Records:
    known = records.before(span.last)
    return Records(known.machine, known.hour - span.first, known.kind)
