"""Rollouts: stage by stage, stopped by the shadow and by boxes, decided by operators."""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from apps.maintenance.sync.audit import verify_audit
from apps.maintenance.sync.boxes import BoxReport
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.offers import Offer
from apps.maintenance.sync.operators import Action, Decision, SignedDecision, write_operator
from apps.maintenance.sync.policy import Plan, Status, Step, Tally, decide
from apps.maintenance.sync.rollout import Rollout, Shadow
from apps.maintenance.sync.shadow import History, ShadowFigures, ShadowLimits, run_shadow
from benchmarks.edge_models import Fault, make_bundle, make_history
from cluster.errors import AccessDeniedError, ConfigurationError, InvalidRequestError

GOOD = Shadow(ShadowFigures(10, 1.0, 40.0, 0.0), ShadowFigures(10, 1.0, 40.0, 0.0))
PLAN = Plan(shares=(0.1, 0.5, 1.0), max_error=0.02, approvals=(0,), patience_s=1000)


def offer_of(version: int, groups: Sequence[str] = ("*",)) -> Offer:
    return Offer(f"f/{version}.tar", version, tuple(groups), f"digest-{version}", 1, ())


class Rig:
    """A fleet that reports, an operator that decides, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 1_000_000.0
        self.key = Ed25519PrivateKey.generate()
        write_operator(folder / "operators", "ada", self.key.public_key())
        self.control = Control(folder, lambda: self.now_s)
        self.versions: dict[str, int] = {}
        self.failed: dict[str, dict[str, str]] = {}

    def tell(self, agent: str, *, group: str = "plant", outcome: str = "") -> str | None:
        """Let a box report; return what it is told to take."""
        self.now_s += 0.01
        version = self.versions.setdefault(agent, 1)
        facts = {
            "agent": agent,
            "group": group,
            "version": version,
            "digest": f"digest-{version}",
            "confirmed": True,
            "failed": self.failed.get(agent, {}),
            "outcome": outcome,
        }
        return self.control.rollouts.report(BoxReport.from_record(agent, facts))

    def tell_all(self, num: int, first: int = 0) -> set[str]:
        """Let boxes report; return those that are told to take version 2."""
        names = [f"box{idx:03d}" for idx in range(first, first + num)]
        return {name for name in names if self.tell(name) == "f/2.tar"}

    def take(self, names: set[str], version: int = 2) -> None:
        """Let boxes succeed."""
        for name in sorted(names):
            self.versions[name] = version
            self.tell(name)

    def give_up(self, name: str, version: int = 2) -> None:
        """Let a box fail."""
        self.failed[name] = {f"digest-{version}": "health_alerts"}
        self.tell(name)

    def begin(self, plan: Plan = PLAN, shadow: Shadow = GOOD) -> Rollout:
        return self.control.rollouts.begin(offer_of(2), "plant", plan, shadow)

    def decision(self, action: Action, operator: str = "ada") -> Decision:
        rollout = self.control.rollouts.list()[0]
        self.now_s += 1
        return Decision(rollout.id, rollout.digest, rollout.stage, action, operator, self.now_s)

    def act(self, action: Action) -> Rollout:
        return self.control.rollouts.act(self.decision(action).sign(self.key))

    @property
    def status(self) -> str:
        return str(self.rollout.status)

    @property
    def rollout(self) -> Rollout:
        return self.control.rollouts.list()[0]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    found = Rig(tmp_path)
    yield found
    found.control.close()


def test_it_goes_from_canary_over_approval_to_all(rig: Rig) -> None:
    rig.tell_all(40)
    rig.begin()
    canary = rig.tell_all(40)
    assert len(canary) == 4
    rig.take(canary)
    assert rig.status == "awaiting_approval"
    assert rig.tell_all(40) == canary  # nobody else before an operator says so
    rig.act(Action.APPROVE)
    half = rig.tell_all(40)
    assert len(half) == 20
    assert canary < half
    rig.take(half)
    everybody = rig.tell_all(40)
    assert len(everybody) == 40
    rig.take(everybody)
    assert rig.status == "done"
    assert rig.control.rollouts.stable("plant") == "f/2.tar"
    rig.control.verify_audit()


def test_it_stops_by_itself_and_the_rest_is_untouched(rig: Rig) -> None:
    rig.tell_all(40)
    rig.begin()
    canary = rig.tell_all(40)
    rig.give_up(min(canary))
    assert rig.rollout.status is Status.STOPPED
    assert "1 of 4" in rig.rollout.reason
    assert rig.tell_all(40) == set()
    assert rig.rollout.tally.num == len(canary)


def test_a_few_failures_are_borne_where_the_plan_says_so(rig: Rig) -> None:
    plan = replace(PLAN, max_error=0.3, min_success=0.7, approvals=())
    rig.tell_all(40)
    rig.begin(plan)
    canary = rig.tell_all(40)
    rig.give_up(min(canary))
    rig.take(canary - {min(canary)})
    assert (rig.rollout.status, rig.rollout.stage) == (Status.RUNNING, 1)


def test_late_joiners_join(rig: Rig) -> None:
    rig.tell_all(10)
    rig.begin(replace(PLAN, approvals=()))
    first = rig.tell_all(10)
    assert len(first) == 1
    rig.tell_all(10, first=10)
    second = rig.tell_all(20)  # ten more boxes, one more canary
    assert len(second) == 2
    assert first < second
    for _ in range(6):
        rig.take(rig.tell_all(20))
    assert rig.rollout.status is Status.DONE
    assert rig.tell("newcomer") == "f/2.tar"


def test_a_pause_holds_back_who_has_not_begun(rig: Rig) -> None:
    rig.tell_all(20)
    rig.begin()
    canary = sorted(rig.tell_all(20))
    rig.versions[canary[0]] = 2
    rig.tell(canary[0])
    rig.act(Action.PAUSE)
    assert rig.tell(canary[0]) == "f/2.tar"  # has it already
    assert rig.tell(canary[1]) is None
    rig.act(Action.RESUME)
    assert rig.tell(canary[1]) == "f/2.tar"


def test_silent_boxes_are_not_waited_for(rig: Rig) -> None:
    rig.tell_all(20)
    rig.begin(replace(PLAN, approvals=()))
    canary = sorted(rig.tell_all(20))
    rig.take({canary[0]})
    rig.now_s += 2000
    rig.tell("box000" if "box000" not in canary else "box001")
    assert rig.rollout.stage > 0
    rig.versions[canary[1]] = 2  # comes back, has it
    before = rig.rollout.tally.succeeded
    rig.tell(canary[1])
    assert rig.rollout.tally.succeeded == before + 1


def test_boxes_that_may_not_take_it_do_not_stop_it(rig: Rig) -> None:
    rig.tell_all(20)
    rig.begin(replace(PLAN, approvals=()))
    canary = sorted(rig.tell_all(20))
    rig.tell(canary[0], outcome="pinned")
    rig.take({canary[1]})
    assert rig.rollout.status is Status.RUNNING
    assert rig.rollout.stage == 1


@pytest.mark.parametrize(
    ("new", "word"),
    [
        (ShadowFigures(10, 1.0, 38.0, 0.0), "lead"),
        (ShadowFigures(10, 0.9, 40.0, 0.0), "caught"),
        (ShadowFigures(10, 1.0, 40.0, 0.06), "false alarms"),
        (ShadowFigures(0, 0.0, 0.0, 0.0, failed="model failed"), "model failed"),
    ],
)
def test_the_shadow_stops_it_before_any_box_is_told(
    rig: Rig, new: ShadowFigures, word: str
) -> None:
    rig.tell_all(20)
    rollout = rig.begin(shadow=Shadow(new, GOOD.old))
    assert rollout.status is Status.STOPPED
    assert word in rollout.reason
    assert rig.tell_all(20) == set()


def test_only_one_rollout_a_group_is_open(rig: Rig) -> None:
    rig.begin()
    with pytest.raises(ConfigurationError, match="no open rollout"):
        rig.begin()
    rig.act(Action.STOP)
    rig.begin()
    with pytest.raises(ConfigurationError, match="expected group other"):
        rig.control.rollouts.begin(offer_of(2, ["plant"]), "other", PLAN, GOOD)


def test_decisions_need_the_operators_signature(rig: Rig) -> None:
    rig.tell_all(20)
    rig.begin()
    pause = rig.decision(Action.PAUSE)
    act = rig.control.rollouts.act
    with pytest.raises(AccessDeniedError, match="signature of ada"):
        act(pause.sign(Ed25519PrivateKey.generate()))
    with pytest.raises(AccessDeniedError, match="expected one of ada"):
        act(replace(pause, operator="eve").sign(rig.key))
    altered = SignedDecision(replace(pause, action=Action.STOP), pause.sign(rig.key).signature)
    with pytest.raises(AccessDeniedError):
        act(altered)
    with pytest.raises(InvalidRequestError, match="stage"):
        act(replace(pause, stage=1).sign(rig.key))
    with pytest.raises(InvalidRequestError, match="awaiting_approval to approve"):
        act(rig.decision(Action.APPROVE).sign(rig.key))
    act(pause.sign(rig.key))
    rig.act(Action.RESUME)
    with pytest.raises(InvalidRequestError, match="old one"):
        act(pause.sign(rig.key))  # not a second time
    assert rig.rollout.status is Status.RUNNING


def test_a_decision_survives_the_wire_and_nothing_else_does(rig: Rig) -> None:
    rig.begin()
    signed = rig.decision(Action.PAUSE).sign(rig.key)
    assert SignedDecision.from_record(signed.to_record()) == signed
    wrong: list[dict[str, object]] = [{}, {"action": "launch"}, {"x": 1}, {"signature": "no hex"}]
    for record in [wrong[0], *({**signed.to_record(), **each} for each in wrong[1:])]:
        with pytest.raises(InvalidRequestError, match="decision"):
            SignedDecision.from_record(record)


def test_the_audit_log_cannot_be_changed_unseen(rig: Rig, tmp_path: Path) -> None:
    rig.begin()
    rig.act(Action.PAUSE)
    end = rig.control.verify_audit()
    actions = [(entry.actor, entry.action) for entry in rig.control.audit()]
    assert actions == [("rollout", "begin: running"), ("ada", "pause")]
    db = sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)
    for statement in ("UPDATE audit SET actor = 'eve'", "DELETE FROM audit"):
        with pytest.raises(sqlite3.IntegrityError, match="audit log"):
            db.execute(statement)
    db.execute("DROP TRIGGER audit_is_final")
    db.execute("UPDATE audit SET actor = 'eve' WHERE seq = 2")
    with pytest.raises(ConfigurationError, match="entry 2"):
        verify_audit(db)
    db.execute("UPDATE audit SET actor = 'ada' WHERE seq = 2")
    assert verify_audit(db) == end
    db.execute("DROP TRIGGER audit_is_kept")
    db.execute("DELETE FROM audit WHERE seq = 2")
    assert verify_audit(db) != end  # cut off the end: the hash kept elsewhere tells
    db.close()


def test_a_report_of_something_else_is_refused(rig: Rig) -> None:
    facts = {"agent": "a", "group": "g", "version": 1, "digest": "", "confirmed": True}
    facts |= {"failed": {}, "outcome": ""}
    BoxReport.from_record("a", facts)
    wrongs: list[dict[str, object]] = [
        {"agent": "b"},
        {"version": "1"},
        {"group": ""},
        {"failed": []},
    ]
    for wrong in wrongs:
        with pytest.raises(InvalidRequestError, match="report"):
            BoxReport.from_record("a", {**facts, **wrong})


@pytest.mark.parametrize(
    ("stage", "tally", "expected"),
    [
        (0, Tally(), (Status.RUNNING, 0)),  # nobody there yet
        (0, Tally(pending=1, succeeded=3), (Status.RUNNING, 0)),
        (0, Tally(succeeded=4), (Status.AWAITING_APPROVAL, 0)),
        (1, Tally(succeeded=50), (Status.RUNNING, 2)),
        (1, Tally(pending=9, succeeded=40, failed=1), (Status.RUNNING, 1)),
        (1, Tally(pending=8, succeeded=40, failed=2), (Status.STOPPED, 1)),
        (1, Tally(succeeded=49, failed=1), (Status.RUNNING, 2)),
        (1, Tally(unreached=50), (Status.RUNNING, 1)),
        (1, Tally(unreached=10, succeeded=40), (Status.RUNNING, 2)),
        (2, Tally(succeeded=100), (Status.DONE, 2)),
        (2, Tally(failed=1), (Status.STOPPED, 2)),
    ],
)
def test_policy(stage: int, tally: Tally, expected: tuple[Status, int]) -> None:
    step: Step = decide(PLAN, stage, tally)
    assert (step.status, step.stage) == expected


@pytest.mark.parametrize(
    "wrong", [{"shares": (0.5, 0.2, 1.0)}, {"shares": (0.5,)}, {"shares": (0.0, 1.0)}]
)
def test_a_plan_that_cannot_work_is_refused(wrong: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ConfigurationError, match="shares"):
        Plan(**wrong)  # type: ignore[arg-type]


def test_the_shadow_measures_lead_and_false_alarms() -> None:
    """Wear reaches the alarm 40 h before a failure, in the late model 10 h before."""
    history = make_history(num_machines=6, num_failures=4)
    good, late = (run_shadow(make_bundle(2, fault), history) for fault in (Fault.NONE, Fault.LATE))
    assert good.num_failures == late.num_failures == 24
    assert (good.caught, late.caught) == (1.0, 1.0)
    assert 36 <= good.lead_p50_h <= 42
    assert 8 <= late.lead_p50_h <= 12
    assert good.false_per_month == 0
    assert "lead" in ShadowLimits().objection(late, good)
    assert not ShadowLimits().objection(good, good)
    noisy = run_shadow(make_bundle(2, Fault.ALARMING_LIVE), replace_regime(history))
    assert noisy.false_per_month > 1
    assert "false alarms" in ShadowLimits().objection(noisy, good)
    raising = run_shadow(make_bundle(2, Fault.RAISING_LIVE), replace_regime(history))
    assert "model" in ShadowLimits().objection(raising, None)


def replace_regime(history: History) -> History:
    """Return a history in which regime is 1 for a day, far from failures."""
    features = history.features.copy()
    is_day = (history.hour % 200 >= 20) & (history.hour % 200 < 44)
    features[:, list(history.names).index("regime")] = np.where(is_day, 1.0, 0.0)
    return replace(history, features=features)


@pytest.mark.parametrize(
    ("false_old", "caught_new", "is_refused"),
    [(4.0, 0.7, False), (4.0, 0.4, True), (0.9, 0.7, True), (0.04, 0.9, True)],
)
def test_warnings_that_were_bought_with_false_alarms_set_no_standard(
    false_old: float, caught_new: float, *, is_refused: bool
) -> None:
    old = ShadowFigures(30, 0.96, 46.0, false_old)
    new = ShadowFigures(30, caught_new, 37.0, min(0.6, false_old))
    assert bool(ShadowLimits().objection(new, old)) == is_refused
