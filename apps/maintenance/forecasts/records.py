"""Forecasts for people and programs: lines, JSON, and the table that the ledger replays.

forecasts.parquet   time, machine, variant, version, decision_{h}h (component or null),
                    chance_{h}h_{component}, hours_low, hours_median, hours_high (null: open)
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.forecasts.moment import Moment
from apps.maintenance.protocol import HORIZONS

TABLE = "forecasts.parquet"


def records_of(moment: Moment, calibration: Calibration) -> Iterator[Mapping[str, Any]]:
    """Yield a row of the table per machine."""
    answers = moment.answers
    for n, (machine, variant) in enumerate(zip(moment.machines, moment.variants, strict=True)):
        low, middle, high = answers.hours[n].tolist()
        row: dict[str, Any] = {
            "time": moment.time,
            "machine": machine,
            "variant": variant,
            "version": answers.version,
            "hours_low": low,
            "hours_median": middle,
            "hours_high": high if np.isfinite(high) else None,
        }
        for i, horizon in enumerate(HORIZONS):
            decided = int(answers.decision[n, i])
            row[f"decision_{horizon}h"] = calibration.components[decided - 1] if decided else None
            for c, component in enumerate(calibration.components):
                row[f"chance_{horizon}h_{component}"] = float(answers.chance[n, i, c])
        yield row


def write_table(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write the table; it appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TABLE
    partial = path.with_name(f"partial-{TABLE}")
    pd.DataFrame(rows).to_parquet(partial, index=False)
    partial.rename(path)
    return path


def as_json(moment: Moment, calibration: Calibration) -> Mapping[str, Any]:
    """Return the forecasts of a moment, for JSON."""
    return {
        "time": f"{moment.time.isoformat()}Z",
        "version": moment.answers.version,
        "accuracy": {
            name: {str(h): calibration.known_accuracy(name, h) for h in HORIZONS}
            for name in sorted(set(moment.variants))
        },
        "silent": list(moment.silent),
        "machines": [
            {key: value for key, value in row.items() if key not in {"time", "version"}}
            for row in records_of(moment, calibration)
        ],
    }


def as_text(moment: Moment, calibration: Calibration, horizon: int) -> str:
    """Return lines for people: a machine and component each, highest chance first."""
    lines = [f"{moment.time:%Y-%m-%d %H:%M} UTC, model {moment.answers.version}"]
    for variant in sorted(set(moment.variants)):
        known = calibration.known_accuracy(variant, horizon)
        said = "accuracy not measured"
        if known is not None:
            said = (
                f"held-out macro F1 {known['macro_f1']:.3f} at {horizon} h, "
                f"{known['false_alarms_per_machine_month']:.3f} false alarms a machine-month"
            )
        lines.append(f"inputs {variant}: {moment.variants.count(variant)} machines; {said}")
    if moment.silent:
        lines.append(f"no forecast, nothing known: {', '.join(moment.silent)}")
    heads = "".join(f"{f'{h} h':>8}" for h in HORIZONS)
    lines.append(f"{'machine':12} {'component':12}{heads}   hours left, 90 % interval")
    chance = moment.answers.chance
    order = np.argsort(-chance[:, HORIZONS.index(horizon)].max(axis=1), kind="stable")
    for n in order:
        low, middle, high = moment.answers.hours[n]
        left = f"{middle:.0f} ({low:.0f} to {'open' if np.isinf(high) else f'{high:.0f}'})"
        for c, component in enumerate(calibration.components):
            cells = "".join(f"{value:8.3f}" for value in chance[n, :, c])
            lines.append(f"{moment.machines[n]:12} {component:12}{cells}   {left}")
    return "\n".join(lines)


def write_json(moment: Moment, calibration: Calibration, path: Path) -> None:
    """Write the forecasts of a moment."""
    path.write_text(json.dumps(as_json(moment, calibration), indent=1) + "\n", encoding="utf-8")
