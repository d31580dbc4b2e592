"""Drift and ledger."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.console.bundles import Bundles
from apps.console.drift import NUM, Drift, psi
from apps.console.index import MessageIndex
from apps.console.ledger import read_ledger
from apps.maintenance.edge.bundle import GOLDEN, INFO, MODEL, BundleInfo, pack, unpack
from apps.maintenance.edge.spread import Spread
from apps.maintenance.sync.boxes import list_boxes, save_messages
from apps.maintenance.sync.database import Database
from apps.maintenance.sync.publishing import publish_bundle
from benchmarks.edge_models import make_bundle
from benchmarks.edge_rig import SignedFolder
from cluster.errors import ConfigurationError

LEDGER: Mapping[str, Any] = {
    "period": {"from": "2026-01-01", "to": "2026-03-31"},
    "policy": {"planned_hours": 310.5, "unplanned_hours": 96},
    "baseline": {"name": "4-hour horizon", "planned_hours": 120, "unplanned_hours": 260},
    "saving": {"share": 0.631, "interval": [0.55, 0.7], "level": 0.9},
    "cost_model": {"hours_of_an_unplanned_stop": 8},
}


def test_psi_of_two_bins_by_hand() -> None:
    """Shares .5 and .5 against .25 and .75 at the median: .25 ln 2 + .25 ln 1.5."""
    first = np.array([0.0, 1.0] * 200)
    newest = np.array([0.0, 1.0, 1.0, 1.0] * 100)
    expected = 0.25 * np.log(2) + 0.25 * np.log(1.5)
    assert psi(first, newest) == pytest.approx(expected, abs=0.02)


def test_psi_without_a_change_is_as_stated() -> None:
    random = np.random.default_rng(0)
    found = [psi(random.random(NUM), random.random(NUM)) for _ in range(400)]
    assert np.mean(found) == pytest.approx(0.036, abs=0.003)
    assert np.mean(np.array(found) > 0.1) < 0.01


def test_psi_sees_a_shift_and_something_never_seen() -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=NUM)
    assert psi(first, first + 1) > 0.25
    assert np.isfinite(psi(first, np.full(NUM, 100.0)))
    assert psi(np.zeros(NUM), np.zeros(NUM)) == 0.0


def forecasts(first: int, num: int, low: float) -> list[dict[str, Any]]:
    """Return messages with hazards of ``low`` and above."""
    random = np.random.default_rng(first)
    facts = {"kind": "forecast", "machine": "m", "version": "v-1", "time": "2026-01-01T00:00:00Z"}
    return [
        {"seq": seq, "body": {**facts, "hazard": [[peak]], "life": [1.0, 2.0 - peak, 3.0]}}
        for seq, peak in enumerate(random.uniform(low, low + 0.5, num).tolist(), start=first)
    ]


def test_drift_is_measured_anew_as_forecasts_come_in(database: Database, tmp_path: Path) -> None:
    index, drift = MessageIndex(database), Drift(database, Bundles(tmp_path))

    def verdicts() -> dict[str, tuple[str, int]]:
        index.catch_up()
        found = drift.view(list_boxes(database, 1.0))
        return {each["agent"]: (each["verdict"], each["num"]) for each in found}

    save_messages(database, "a", forecasts(1, 2 * NUM - 1, 0.0))
    assert verdicts() == {"a": ("waiting", 2 * NUM - 1), "b": ("waiting", 0)}
    save_messages(database, "a", forecasts(2 * NUM, 1, 0.0))
    assert verdicts()["a"] == ("steady", 2 * NUM)
    save_messages(database, "a", forecasts(2 * NUM + 1, NUM, 0.4))
    assert verdicts()["a"] == ("drifted", 3 * NUM)
    assert list(verdicts()) == ["a", "b"]  # largest first


def test_windows_are_measured_against_the_training_of_their_model(
    database: Database, tmp_path: Path
) -> None:
    MessageIndex(database)
    signed = SignedFolder(tmp_path / "repository")
    files = unpack(make_bundle(1))
    reference = {name: Spread.of(np.linspace(0, 1, 1001)) for name in ("wear", "load")}
    info = replace(BundleInfo.from_json(files[INFO]), reference=reference)
    publish_bundle(signed.repository, pack(info, files[GOLDEN], files[MODEL]))
    drift = Drift(database, Bundles(signed.folder))
    even, moved = [50] * 10 + [0], [0] * 9 + [500, 0]
    counts = {"version": info.name, "windows": 500, "counts": {"wear": even, "load": moved}}
    boxes = [replace(box, facts={"drift": counts}) for box in list_boxes(database, 1.0)[:1]]
    (found,) = drift.view(boxes)
    assert (found["training"]["name"], found["training"]["windows"]) == ("load", 500)
    assert found["training"]["psi"] > 1
    silent = replace(boxes[0], facts={"drift": {**counts, "version": "forecast-both-9"}})
    assert drift.view([silent])[0]["training"] is None


def test_the_ledger_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    assert read_ledger(path) is None
    path.write_text(json.dumps(LEDGER))
    found = read_ledger(path)
    assert found is not None
    assert found["interval"] == [0.55, 0.7]
    assert found["baseline"]["unplanned_hours"] == 260.0


@pytest.mark.parametrize("field", sorted(LEDGER))
def test_a_ledger_without_a_field_is_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps({name: LEDGER[name] for name in LEDGER if name != field}))
    with pytest.raises(ConfigurationError, match=r"ledger\.json: expected period"):
        read_ledger(path)


def test_a_ledger_with_text_for_hours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps({**LEDGER, "policy": {"planned_hours": "x", "unplanned_hours": 1}}))
    with pytest.raises(ConfigurationError, match="expected a number"):
        read_ledger(path)
