"""Triggers: thresholds with hysteresis, the figures behind them, and what they lead to."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.maintenance.edge.bundle import GOLDEN, INFO, MODEL, BundleInfo, pack, unpack
from apps.maintenance.edge.drift import NEWEST
from apps.maintenance.edge.spread import DRIFTED, STEADY, Spread, steady_spreads
from apps.maintenance.fleet import Fleet, Records
from apps.maintenance.sync.boxes import Box, save_messages
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.evidence import (
    LEAST_ALERTS,
    LEAST_WINDOWS,
    Alert,
    alerts_of,
    read_drift,
    read_precision,
    readings,
)
from apps.maintenance.sync.offers import Offer
from apps.maintenance.sync.policy import Plan
from apps.maintenance.sync.publishing import publish_bundle
from apps.maintenance.sync.retrainings import PAUSE_S, Retraining, State
from apps.maintenance.sync.rollout import Shadow
from apps.maintenance.sync.shadow import ShadowFigures
from apps.maintenance.sync.triggers import RULES, Reading, Trigger, read_triggers
from benchmarks.edge_models import COMPONENTS, make_bundle
from benchmarks.edge_rig import Box as Agent
from benchmarks.edge_rig import SignedFolder
from cluster.errors import ConfigurationError

START = datetime(2026, 1, 1)
GROUP = "plant"


def described(version: int, reference: Mapping[str, Spread], until: float = 0.0) -> bytes:
    """Return a bundle that says how its training was spread."""
    files = unpack(make_bundle(version))
    info = replace(BundleInfo.from_json(files[INFO]), reference=reference, trained_until=until)
    return pack(info, files[GOLDEN], files[MODEL])


def info_of(packed: bytes) -> BundleInfo:
    return BundleInfo.from_json(unpack(packed)[INFO])


def tenths() -> Spread:
    return Spread.of(np.linspace(0, 1, 1001))


INFO_1 = info_of(described(1, {"wear": tenths()}, START.replace(tzinfo=UTC).timestamp()))


class Desk:
    """A fleet without boxes, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 1_000_000.0
        self.control = Control(folder, lambda: self.now_s)

    def look(self, early: tuple[Trigger, ...] = (), **values: float | None) -> Retraining | None:
        found = {Trigger(name): Reading(value, "test") for name, value in values.items()}
        self.now_s += 1
        return self.control.retrainings.look(GROUP, found, early)

    def active(self) -> set[str]:
        with self.control.database.transaction() as db:
            return {each.trigger for each in read_triggers(db, GROUP) if each.is_active}

    def actions(self) -> list[str]:
        return [each.action for each in self.control.audit(1000)]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path)
    with found.control:
        yield found


def reported(agent: str, counts: object, version: str = INFO_1.name) -> Box:
    facts = {"drift": {"version": version, "windows": 1, "counts": counts}}
    return Box(agent, GROUP, 1, 0.0, 0.0, False, facts)


def record_of(failures: list[tuple[int, int, int]], visits: list[tuple[int, int, int]]) -> Fleet:
    """Return a record of three machines and 1000 hours."""

    def records(triples: list[tuple[int, int, int]]) -> Records:
        columns = np.array(triples, np.int64).reshape(-1, 3)
        return Records.sorted(columns[:, 0], columns[:, 1], columns[:, 2])

    return Fleet(
        start=START,
        num_hours=1000,
        machines=["m0", "m1", "m2"],
        models=np.zeros(3, np.int64),
        age_years=np.zeros(3),
        error_names=("e",),
        components=COMPONENTS,
        sensors=("s",),
        errors=records([]),
        failures=records(failures),
        maintenance=records(visits),
        telemetry=np.zeros((3, 1000, 1), np.float32),
    )


def alert(hour: float, machine: str = "m0", component: str = "comp1") -> Alert:
    return Alert(machine, component, START.replace(tzinfo=UTC).timestamp() + hour * 3600)


def test_psi_of_equal_spreads_is_nothing_and_of_a_shift_is_drift() -> None:
    random = np.random.default_rng(0)
    spread = Spread.of(random.normal(size=5000))
    assert spread.psi(spread.count(random.normal(size=2000))) < 0.02
    assert spread.psi(spread.count(random.normal(1.0, size=2000))) > DRIFTED
    unknown = np.where(random.random(2000) < 0.3, np.nan, random.normal(size=2000))
    assert spread.psi(spread.count(unknown)) > DRIFTED  # a sensor that falls silent


def test_what_is_not_steady_in_training_is_not_watched() -> None:
    random = np.random.default_rng(0)
    week = np.repeat(np.arange(10), 500)
    columns = {"sensor": random.normal(size=5000), "age": week + random.normal(size=5000)}
    assert steady_spreads(columns, week).keys() == {"sensor"}


def test_a_trigger_is_raised_and_cleared_at_different_figures(desk: Desk) -> None:
    seen = []
    for value in (0.2, DRIFTED, 0.2, None, STEADY + 0.01, STEADY, 0.2):
        desk.look((Trigger.DRIFT,), drift=value)
        seen.append(desk.active() == {"drift"})
    assert seen == [False, True, True, True, True, False, False]
    assert desk.actions() == ["raise trigger", "clear trigger"]
    facts = json.loads(desk.control.audit(10)[0].detail)
    assert facts == {"group": GROUP, "trigger": "drift", "value": DRIFTED, "detail": "test"}


def test_precision_is_bad_where_it_is_low(desk: Desk) -> None:
    seen = []
    for value in (0.4, 0.3, 0.4, 0.5):
        desk.look((Trigger.PRECISION,), precision=value)
        seen.append(bool(desk.active()))
    assert seen == [False, True, True, False]


@pytest.mark.parametrize("trigger", list(Trigger))
def test_every_trigger_has_its_rule(trigger: Trigger, desk: Desk) -> None:
    found = desk.look((), **{trigger.value: RULES[trigger].raise_at})
    assert found is not None
    assert found.reasons == (trigger,)


def test_triggers_of_a_running_retraining_are_folded_into_it(desk: Desk) -> None:
    first = desk.look(drift=0.3)
    assert first is not None
    desk.control.retrainings.fold(GROUP, {Trigger.SAMPLES: Reading(500.0, "test")})
    (running,) = desk.control.retrainings.list(GROUP)
    assert running.reasons == ("drift", "samples")
    again = desk.look(drift=0.3, samples=500.0)  # as after a kill: the same one goes on
    assert again is not None
    assert again.number == first.number
    assert desk.actions().count("begin retraining") == 1
    assert desk.actions().count("fold triggers") == 1


def test_a_failed_retraining_does_not_block_the_next_trigger(desk: Desk) -> None:
    first = desk.look(drift=0.3)
    assert first is not None
    desk.control.retrainings.note(first.number, State.FAILED, "no reason")
    assert "retraining failed" in desk.actions()
    assert desk.look(drift=0.3) is None  # it was answered; it asks again after a pause
    second = desk.look(drift=0.3, samples=500.0)
    assert second is not None
    assert second.number != first.number


def test_a_trigger_that_stays_asks_again_after_a_pause(desk: Desk) -> None:
    first = desk.look(drift=0.3)
    assert first is not None
    desk.control.retrainings.note(first.number, State.FAILED, "no reason")
    desk.now_s += PAUSE_S - 10
    assert desk.look(drift=0.3) is None
    desk.now_s += 10
    assert desk.look(drift=0.3) is not None


def test_nothing_begins_while_a_rollout_is_open_or_labels_are_few(desk: Desk) -> None:
    assert desk.look((Trigger.DRIFT,), drift=0.3) is None
    figures = ShadowFigures(10, 1.0, 40.0, 0.0)
    offer = Offer("f/2.tar", 2, ("*",), "digest", 1, ())
    desk.control.rollouts.begin(offer, GROUP, Plan(), Shadow(figures, figures))
    assert desk.look(drift=0.3) is None
    assert desk.active() == {"drift"}


def test_drift_is_that_of_all_boxes_together() -> None:
    even = [100] * 10 + [0]
    low, high = [200] * 5 + [0] * 6, [0] * 5 + [200] * 5 + [0]
    assert read_drift(INFO_1, [reported("a", {"wear": even})]).value == pytest.approx(0.0, abs=0.01)
    together = read_drift(INFO_1, [reported("a", {"wear": low}), reported("b", {"wear": high})])
    assert together.value == pytest.approx(0.0, abs=0.01)
    alone = read_drift(INFO_1, [reported("a", {"wear": low})])
    assert alone.value is not None
    assert alone.value > DRIFTED
    assert alone.detail == "wear, 1000 windows"


@pytest.mark.parametrize(
    "counts",
    [None, {}, {"wear": [1] * 5}, {"wear": ["x"] * 11}, {"wear": [-1] * 11}, {"load": [99] * 11}],
)
def test_counts_that_are_no_counts_are_left_out(counts: object) -> None:
    good = reported("a", {"wear": [100] * 10 + [0]})
    assert read_drift(INFO_1, [good, reported("b", counts)]).detail == "wear, 1000 windows"


def test_few_windows_and_those_of_another_version_say_nothing() -> None:
    few = {"wear": [(LEAST_WINDOWS - 10) // 10] * 10 + [0]}
    assert read_drift(INFO_1, [reported("a", few)]).value is None
    assert (
        read_drift(INFO_1, [reported("a", {"wear": [100] * 11}, "forecast-both-2")]).value is None
    )


def test_an_alert_is_right_wrong_replaced_in_time_or_open() -> None:
    record = record_of(failures=[(0, 130, 0)], visits=[(1, 120, 0)])
    right = [alert(100)] * 12
    wrong = [alert(500)] * 8
    replaced = [alert(100, "m1")] * 50
    undecided = [alert(990)] * 50
    unheard = [alert(100, "m9")] * 50
    found = read_precision(INFO_1, [*right, *wrong, *replaced, *undecided, *unheard], record)
    assert (found.value, found.detail) == (0.6, "20 alerts decided")
    assert read_precision(INFO_1, right[: LEAST_ALERTS - 10], record).value is None


def test_age_and_samples_count_from_the_end_of_the_training() -> None:
    info = replace(INFO_1, trained_until=INFO_1.trained_until + 200 * 3600)
    record = record_of([(0, 100, 0), (0, 200, 1), (1, 300, 0)], [])
    found = readings(info, [], [], record, info.trained_until + 5 * 86_400)
    assert found[Trigger.AGE].value == 5.0
    assert found[Trigger.SAMPLES].value == 2.0
    silent = replace(info, trained_until=0.0)
    assert readings(silent, [], [], record, 0.0)[Trigger.AGE].value is None


def test_alerts_are_those_of_the_version_and_malformed_ones_are_passed_over(
    signed: SignedFolder, box: Agent, desk: Desk
) -> None:
    good: dict[str, Any] = {
        "kind": "alert",
        "machine": "m0",
        "component": "comp1",
        "time": "2026-01-01T00:00:00Z",
        "version": INFO_1.name,
    }
    bodies = [good, {**good, "version": "x"}, {**good, "time": "noon"}, {"kind": "alert"}]
    messages = [{"seq": seq, "body": body} for seq, body in enumerate(bodies, start=1)]
    facts = {**box.agent.status(), "group": GROUP}
    with desk.control.database.transaction() as db:
        db.execute("INSERT INTO boxes VALUES ('box', ?, 0, 0, 1, ?)", (GROUP, json.dumps(facts)))
    save_messages(desk.control.database, "box", messages)
    with desk.control.database.transaction() as db:
        assert alerts_of(db, GROUP, INFO_1.name) == [alert(0)]


def test_a_box_reports_counts_of_its_newest_windows(signed: SignedFolder, box: Agent) -> None:
    publish_bundle(signed.repository, described(2, {"wear": tenths()}))
    assert box.take("forecast-both/2.tar") == "switched"
    box.confirm()
    box.feed(30, wear=0.05)
    box.feed(10, wear=0.95)
    while box.agent.forecast_once():
        pass
    facts: Any = box.agent.status()["drift"]
    assert facts["version"] == "forecast-both-2"
    assert facts["counts"] == {"wear": [30, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0]}
    box.feed(NEWEST, wear=0.95)
    while box.agent.forecast_once():
        pass
    facts = box.agent.status()["drift"]
    assert facts["counts"] == {"wear": [0] * 9 + [NEWEST, 0]}


def test_a_bundle_with_a_reference_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="reference of features"):
        described(1, {"nothing": tenths()})


def test_old_bundles_say_nothing_of_their_training() -> None:
    info = info_of(make_bundle(1))
    assert read_drift(info, [reported("a", {})]).value is None
    assert info.trained_until == 0.0
