"""Aliases, shares by request id, the promotion gate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigurationError, UnknownModelError
from cluster.versions import Aliases, Gate, VersionRecord, share_of

STABLE_REPORT = {"ok": 9000, "failed": 0, "p99_ms": 20.0, "shadowed": 0, "disagreed": 0}
TRIAL_REPORT = {"ok": 1000, "failed": 0, "p99_ms": 21.0, "shadowed": 500, "disagreed": 1}


def test_canary_gets_its_share_of_the_default_and_nothing_of_explicit_requests() -> None:
    aliases = Aliases("a-1", canary="a-2", canary_share=0.1)
    ids = [f"request-{i}" for i in range(10_000)]
    asked = [aliases.resolve("stable", each) for each in ids]
    assert asked.count("a-2") / len(ids) == pytest.approx(0.1, abs=0.01)
    assert {aliases.resolve("a-1", each) for each in ids[:200]} == {"a-1"}
    assert {aliases.resolve("canary", each) for each in ids[:200]} == {"a-2"}


def test_a_retry_meets_the_same_version() -> None:
    aliases = Aliases("a-1", canary="a-2", canary_share=0.5)
    assert all(
        aliases.resolve("stable", f"r{i}") == aliases.resolve("stable", f"r{i}") for i in range(100)
    )


@given(st.text(min_size=1, max_size=128))
def test_a_share_is_a_number_from_zero_to_one(request_id: str) -> None:
    assert 0.0 <= share_of(request_id, "canary") < 1.0


def test_canary_and_shadow_shares_are_drawn_apart() -> None:
    both = sum(
        share_of(f"r{i}", "canary") < 0.5 and share_of(f"r{i}", "shadow") < 0.5 for i in range(4000)
    )
    assert both / 4000 == pytest.approx(0.25, abs=0.03)


def test_unknown_versions_and_impossible_shares_are_named() -> None:
    with pytest.raises(UnknownModelError, match="'stable' or one of \\['a-1'\\], got 'a-9'"):
        Aliases("a-1").resolve("a-9", "r")
    with pytest.raises(UnknownModelError, match="got 'canary'"):
        Aliases("a-1").resolve("canary", "r")
    with pytest.raises(ConfigurationError, match="shadow_share: expected 0 to 1, got 2"):
        Aliases("a-1", shadow="a-2", shadow_share=2)
    with pytest.raises(ConfigurationError, match="a version and a share above 0, or neither"):
        Aliases("a-1", canary="a-2")


def test_promotion_and_rollback_swap_stable_and_previous() -> None:
    promoted = Aliases("a-1", canary="a-2", canary_share=0.1, previous="a-0").promoted("a-2")
    assert promoted == Aliases("a-2", previous="a-1")
    assert promoted.rolled_back() == Aliases("a-1", previous="a-2")
    with pytest.raises(ConfigurationError, match="expected a version before 'a-1'"):
        Aliases("a-1").rolled_back()


def test_gate_lets_a_good_version_pass_and_names_each_objection() -> None:
    gate = Gate()
    assert gate.objections(TRIAL_REPORT, STABLE_REPORT) == []
    bad = {"ok": 90, "failed": 10, "p99_ms": 40.0, "shadowed": 100, "disagreed": 20}
    objections = gate.objections(bad, STABLE_REPORT)
    assert len(objections) == 4
    assert "got 200" in objections[0]
    assert "got 10.0%" in objections[1]
    assert "got 2.00 times" in objections[2]
    assert "got 20.0%" in objections[3]


def test_record_reports_quantiles_of_the_latest() -> None:
    record = VersionRecord()
    assert record.report()["p99_ms"] is None
    record.latencies_ms.extend(float(i) for i in range(101))
    assert (record.report()["p50_ms"], record.report()["p99_ms"]) == (50.0, 99.0)
