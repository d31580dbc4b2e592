"""Slots and pointer: one step, nothing named is written to, a way back."""

from pathlib import Path

import pytest

from apps.maintenance.edge.bundle import MODEL
from apps.maintenance.edge.slots import MAX_FAILED, PACKED, Slots
from apps.maintenance.sync.outcomes import Outcome, RefusedError
from benchmarks.edge_models import make_bundle
from cluster.errors import ConfigurationError

ONE, TWO, THREE = make_bundle(1), make_bundle(2), make_bundle(3)


def install(slots: Slots, packed: bytes, *, confirm: bool = True) -> None:
    slots.switch(packed, slots.stage(packed))
    if confirm:
        slots.confirm()


def test_bundles_alternate_and_the_pointer_survives_a_restart(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    for packed, version in ((ONE, 1), (TWO, 2), (THREE, 3)):
        install(slots, packed)
        again = Slots(tmp_path)
        assert again.pointer == slots.pointer
        assert (again.pointer.version, again.pointer.floor) == (version, version)
        assert again.is_whole(again.pointer.active)
    assert slots.pointer.good in {"a", "b"} - {slots.pointer.active}
    assert slots.base(slots.pointer.digests[slots.pointer.good]) == TWO


def test_staging_does_not_touch_what_serves(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, ONE)
    before = slots.pointer.active
    slots.stage(TWO)
    assert slots.pointer.active == before
    assert slots.is_whole(before)
    assert slots.pointer.version == 1


def test_a_rollback_serves_the_good_slot_and_remembers_the_bad_one(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, ONE)
    install(slots, TWO, confirm=False)
    bad = slots.pointer.digest
    slots.roll_back(Outcome.HEALTH_ALERTS)
    again = Slots(tmp_path).pointer
    assert (again.version, again.is_confirmed, again.floor) == (1, True, 1)
    assert again.failed == {bad: "health_alerts"}
    assert slots.base(bad) is None


def test_nothing_is_staged_while_a_slot_is_watched(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, ONE, confirm=False)
    with pytest.raises(ConfigurationError, match="watch"):
        slots.stage(TWO)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, ONE)
    for packed in (b"", b"garbage", ONE[:5000], ONE.replace(b"trimoe-edge-bundle/1", b"x" * 20)):
        with pytest.raises(RefusedError) as refusal:
            slots.stage(packed)
        assert refusal.value.outcome is Outcome.BUNDLE_INVALID
    assert slots.is_whole(slots.pointer.active)


def test_an_altered_file_is_seen_and_repaired_from_the_packed_bundle(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, ONE)
    slot = slots.pointer.active
    (slots.folder(slot) / MODEL).write_bytes(b"altered")
    assert not slots.is_whole(slot)
    slots.repair(slot)
    assert slots.is_whole(slot)
    (slots.folder(slot) / PACKED).write_bytes(b"altered too")
    with pytest.raises(RefusedError, match="slot_damaged"):
        slots.repair(slot)


def test_a_start_is_counted_on_disk_before_anything_is_loaded(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, ONE, confirm=False)
    assert Slots(tmp_path).pointer.starts == 1
    slots.count_start()
    assert Slots(tmp_path).pointer.starts == 2


def test_what_is_remembered_as_bad_is_bounded(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    for idx in range(MAX_FAILED + 5):
        slots.condemn(f"{idx}", Outcome.GOLDEN_MISMATCH)
    assert list(slots.pointer.failed) == [str(idx) for idx in range(5, MAX_FAILED + 5)]


def test_a_damaged_pointer_is_made_anew_from_the_slots(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, ONE)
    install(slots, TWO)
    before = slots.pointer
    (tmp_path / "active.json").write_bytes(b"{")
    slots = Slots(tmp_path)
    assert slots.was_damaged
    found = slots.pointer
    assert (found.active, found.good, found.version) == (before.active, before.good, 2)
    assert (found.is_confirmed, found.floor) == (False, 1)  # it is watched anew
    assert not Slots(tmp_path).was_damaged
    (tmp_path / "active.json").write_bytes(b"[]")
    (slots.folder(found.active) / PACKED).unlink()
    assert Slots(tmp_path).pointer.version == 1
