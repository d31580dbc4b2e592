"""Bad models: never activated, or given up within the window, and the good one serves."""

import pytest

from apps.maintenance.edge.slots import MAX_STARTS
from apps.maintenance.sync.outcomes import Outcome, RefusedError
from apps.maintenance.sync.publishing import Permit, permit_downgrade, publish_bundle, sign_bundle
from benchmarks.edge_models import Fault, make_bundle
from benchmarks.edge_rig import ONE, TWO, Box, SignedFolder


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault.GOLDEN, Outcome.GOLDEN_MISMATCH),
        (Fault.RAISING, Outcome.MODEL_FAILED),
        (Fault.BROKEN, Outcome.MODEL_FAILED),
    ],
)
def test_what_does_not_pass_the_golden_batch_is_never_activated(
    box: Box, signed: SignedFolder, fault: Fault, outcome: Outcome
) -> None:
    with pytest.raises(RefusedError):  # nor published by who plays fair
        publish_bundle(signed.repository, make_bundle(2, fault))
    sign_bundle(signed.repository, make_bundle(2, fault))
    before = box.slots.pointer.active
    assert box.take(TWO) is outcome
    assert (box.slots.pointer.active, box.slots.pointer.version) == (before, 1)
    assert box.take(TWO) is Outcome.KNOWN_BAD  # and it is not fetched again
    assert {outcome, Outcome.KNOWN_BAD} <= set(box.events)


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault.SLOW, Outcome.HEALTH_LATENCY),
        (Fault.RAISING_LIVE, Outcome.HEALTH_ERRORS),
        (Fault.ALARMING_LIVE, Outcome.HEALTH_ALERTS),
        (Fault.NAN_LIVE, Outcome.HEALTH_OUTPUT),
    ],
)
def test_what_passes_the_golden_batch_and_is_not_healthy_is_given_up(
    box: Box, signed: SignedFolder, fault: Fault, outcome: Outcome
) -> None:
    publish_bundle(signed.repository, make_bundle(2, fault))
    assert box.take(TWO) is Outcome.SWITCHED
    num = 0
    while box.agent.serving.is_watching:
        box.feed(8, regime=1.0)
        num += box.agent.forecast_once()
        assert num < 80, "the window is over"
    assert outcome in box.events
    assert (box.slots.pointer.version, box.slots.pointer.is_confirmed) == (1, True)
    assert box.agent.counts.windows == num  # no window went without an answer
    box.feed(8, regime=1.0)
    assert box.agent.forecast_once() == 8
    versions = [each.body for each in box.agent.outbox.head(10**6) if b'"forecast"' in each.body]
    assert b"forecast-both-1" in versions[-1]
    assert box.take(TWO) is Outcome.KNOWN_BAD


def test_a_slow_model_is_given_up_without_a_single_window(box: Box, signed: SignedFolder) -> None:
    """The golden batch stands in for telemetry that does not come."""
    publish_bundle(signed.repository, make_bundle(2, Fault.SLOW))
    box.take(TWO)
    box.confirm()
    assert Outcome.HEALTH_LATENCY in box.events
    assert box.slots.pointer.version == 1


def test_a_model_that_takes_the_process_down_is_given_up(box: Box, signed: SignedFolder) -> None:
    publish_bundle(signed.repository, make_bundle(2))
    box.take(TWO)
    for _ in range(MAX_STARTS - 1):
        box.close()
        box.open()
        assert box.slots.pointer.version == 2
    box.close()
    box.open()
    assert box.slots.pointer.version == 1
    assert Outcome.HEALTH_CRASHES in box.events
    box.feed(3)
    assert box.agent.forecast_once() == 3


def test_a_restart_in_the_watch_watches_anew(box: Box, signed: SignedFolder) -> None:
    publish_bundle(signed.repository, make_bundle(2, Fault.ALARMING_LIVE))
    box.take(TWO)
    box.close()
    box.open()
    assert box.agent.serving.is_watching
    box.feed(30, regime=1.0)
    box.agent.forecast_once()
    assert Outcome.HEALTH_ALERTS in box.events
    assert box.slots.pointer.version == 1


def test_a_damaged_slot_is_repaired_or_left(box: Box, signed: SignedFolder) -> None:
    publish_bundle(signed.repository, make_bundle(2))
    box.take(TWO)
    box.confirm()
    folder = box.slots.folder(box.slots.pointer.active)
    box.close()
    (folder / "model.onnx").write_bytes(b"rotten")
    box.open()
    assert box.slots.pointer.version == 2
    assert "slot_repaired" in box.events
    box.close()
    (folder / "model.onnx").write_bytes(b"rotten")
    (folder / "bundle.tar").write_bytes(b"rotten too")
    box.open()
    assert box.slots.pointer.version == 1
    assert Outcome.SLOT_DAMAGED in box.events
    assert box.take(TWO) is Outcome.SWITCHED  # the disk was to blame, not the model


def test_no_downgrade_without_a_permit(box: Box, signed: SignedFolder) -> None:
    publish_bundle(signed.repository, make_bundle(2))
    box.take(TWO)
    box.confirm()
    assert box.take(ONE) is Outcome.DOWNGRADE
    assert box.slots.pointer.version == 2
    until = signed.calendar()
    permit_downgrade(signed.repository, ONE, Permit((2,), until.replace(year=until.year - 1)))
    assert box.take(ONE) is Outcome.DOWNGRADE  # the permit has ended
    permit_downgrade(signed.repository, ONE, Permit((7,), until.replace(year=until.year + 1)))
    assert box.take(ONE) is Outcome.DOWNGRADE  # and is for others
    permit_downgrade(signed.repository, ONE, Permit((2,), until.replace(year=until.year + 1)))
    assert box.take(ONE) is Outcome.SWITCHED
    assert box.slots.pointer.version == 1


def test_groups_are_kept_apart(box: Box, signed: SignedFolder) -> None:
    publish_bundle(signed.repository, make_bundle(2), ["another"])
    assert box.take(TWO) is Outcome.NOT_FOR_THIS_GROUP
    assert box.take(None) is Outcome.UP_TO_DATE
