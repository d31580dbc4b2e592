"""``trimoe maintenance ledger``: the ledger of a record and the forecasts that were made of it.

The policy acts on the decisions at 48 hours, what it is compared with on those of the same model
at 4 hours.  Both are judged on the failures that either could have caught.  Equal files and costs
give an equal digest.

Legend: N rows, K failures.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apps.maintenance.evaluated import evaluated_table
from apps.maintenance.fleet import Bools, Fleet, Ints
from apps.maintenance.forecasts.records import TABLE
from apps.maintenance.ledger import Conduct, CostModel, conduct, digest, ledger, write_ledger
from apps.maintenance.protocol import Events, Rows, failure_events, hours_to_failure, labels
from apps.maintenance.sources import read_source
from cluster.errors import ConfigurationError

POLICY_HOURS, BASELINE_HOURS = 48, 4
BASELINE = "warnings 4 hours ahead"


def main(args: argparse.Namespace) -> int:
    """Replay a record; print and store its ledger."""
    try:
        costs = CostModel(
            args.wait_hours, args.repair_hours, args.planned_hours, args.inspection_hours
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    fleet = read_source(args.data)
    found = replay(fleet, read_forecasts(args.forecasts, fleet), costs)
    sys.stdout.write(as_text(found) + "\n")
    if args.fleet:
        write_ledger(found, args.fleet)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def read_forecasts(folder: Path, fleet: Fleet) -> pd.DataFrame:
    """Return the table that ``forecast --out`` has kept, or that of a finished evaluation.

    Raises:
        ConfigurationError: There is neither, or it is another table.
    """
    path = folder / TABLE
    if not path.is_file():
        return evaluated_table(folder, fleet)
    table = pd.read_parquet(path)
    missing = {"time", "machine", f"decision_{POLICY_HOURS}h", f"decision_{BASELINE_HOURS}h"} - set(
        table.columns
    )
    if missing:
        message = f"{TABLE}: expected the columns of forecasts, missing {sorted(missing)}"
        raise ConfigurationError(message)
    return table


def replay(fleet: Fleet, table: pd.DataFrame, costs: CostModel) -> dict[str, Any]:
    """Return the ledger, with an entry for every failure.

    Raises:
        ConfigurationError: The forecasts are not of this fleet, or too short to catch anything.
    """
    rows, alarms = _rows(fleet, table)
    after = int(rows.hour.min()) + POLICY_HOURS
    events = failure_events(fleet.failures, rows, after)
    kept = events.hour <= int(rows.hour.max())
    events = Events(events.machine[kept], events.hour[kept])
    if not events.hour.size:
        message = f"expected failures {POLICY_HOURS} hours after the first forecast or later"
        raise ConfigurationError(message)
    hours = hours_to_failure(fleet.failures, rows, len(fleet.components))

    def of(horizon: int) -> Conduct:
        truth = labels(hours, horizon)
        found = conduct(rows, alarms[horizon], truth, events, horizon, fleet.num_machines)
        return _of_machines(found, np.unique(rows.machine))

    policy, baseline = of(POLICY_HOURS), of(BASELINE_HOURS)
    first, last = (fleet.start + timedelta(hours=int(h)) for h in (after, rows.hour.max()))
    found = ledger(policy, baseline, costs, (first, last), BASELINE)
    entries = [
        {
            "time": (fleet.start + timedelta(hours=int(events.hour[k]))).isoformat(),
            "machine": fleet.machines[events.machine[k]],
            "lead_hours": int(policy.lead[k]),
            "baseline_lead_hours": int(baseline.lead[k]),
            "is_planned": bool(policy.lead[k] >= costs.wait_hours),
        }
        for k in range(events.hour.size)
    ]
    found["entries"] = entries
    return {**found, "digest": digest(found)}


def _of_machines(found: Conduct, machines: Ints) -> Conduct:
    """Return a conduct over the machines that were forecast alone."""
    place = np.searchsorted(machines, found.machine)
    return Conduct(found.lead, place, found.false_episodes[machines])


def _rows(fleet: Fleet, table: pd.DataFrame) -> tuple[Rows, Mapping[int, Bools]]:
    """Return the rows of forecasts, sorted, and which are alarms at each horizon."""
    listed = np.array(list(fleet.machines))
    order = np.argsort(listed)
    names = table["machine"].astype(str).to_numpy()
    place = np.searchsorted(listed, names, sorter=order).clip(0, listed.size - 1)
    machine = order[place].astype(np.int64)
    unknown = sorted(set(names[listed[machine] != names]))
    if unknown:
        message = f"{TABLE}: expected machines of the fleet, got {unknown[0]!r}"
        raise ConfigurationError(message)
    since = table["time"].to_numpy("datetime64[s]") - np.datetime64(fleet.start, "s")
    hour = since.astype(np.int64) // 3600
    sort = np.lexsort((hour, machine))
    rows = Rows(machine[sort], hour[sort])
    alarms = {
        horizon: table[f"decision_{horizon}h"].notna().to_numpy()[sort]
        for horizon in (POLICY_HOURS, BASELINE_HOURS)
    }
    return rows, alarms


def as_text(found: Mapping[str, Any]) -> str:
    """Return lines for people."""
    lines = [
        f"{found['failures']} failures, {found['period']['from']} to {found['period']['to']}",
        f"{'':24} {'unplanned h':>12} {'planned h':>10} {'a failure':>18} {'false episodes':>15}",
    ]
    for name, part in (
        (f"acting on {POLICY_HOURS} hours", found["policy"]),
        (found["baseline"]["name"], found["baseline"]),
    ):
        each = (
            f"{part['unplanned_hours_per_failure']:.1f} and {part['planned_hours_per_failure']:.1f}"
        )
        lines.append(
            f"{name:24} {part['unplanned_hours']:12.0f} {part['planned_hours']:10.0f}"
            f" {each:>18} {part['false_episodes']:15d}"
        )
    low, high = found["saving"]["interval"]
    costs = ", ".join(f"{name} {value:g}" for name, value in found["cost_model"].items())
    share = f"{found['saving']['share']:.1%}, {found['saving']['level']:.0%} interval"
    lines += [
        f"unplanned hours spared: {share} {low:.1%} to {high:.1%} over machines",
        f"cost model: {costs}",
        f"digest {found['digest']}",
    ]
    return "\n".join(lines)
