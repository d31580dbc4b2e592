"""The scaling policy: bounded, patient, never on a guess; and as Serve's controller calls it."""

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.autoscaling import (
    Fleet,
    Report,
    Targets,
    TokenPolicy,
    decide,
    next_pause,
    pressure,
    read_reports,
)
from cluster.errors import ConfigurationError

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

TARGETS = Targets(queued_tokens=1000, delay_ms=50, up_pause_s=10, down_pause_s=120)
Policy = Callable[["AutoscalingContext"], tuple[int, dict[str, Any]]]
loads = st.floats(0, 1e7)
reports = st.lists(st.builds(Report, loads, loads), max_size=8).map(tuple)
fleets = st.builds(
    Fleet, st.integers(0, 8), st.integers(0, 8), reports, st.floats(0, 1e6), st.floats(0, 1e6)
)


def even(num: int, load: float, **fields: float) -> Fleet:
    """A fleet whose replicas carry ``load`` replicas' worth of work together."""
    share = load / max(num, 1)
    report = Report(share * TARGETS.queued_tokens, share * TARGETS.delay_ms)
    return Fleet(num, num, (report,) * num, **fields)


@given(fleets, st.floats(1, 2000))
def test_a_step_is_bounded_and_never_to_zero(fleet: Fleet, pause_s: float) -> None:
    num = decide(fleet, TARGETS, pause_s)
    assert min(fleet.num_target, max(1, fleet.num_target - 1)) <= num
    assert num <= max(1, 2 * fleet.num_target)


@given(fleets, st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1, 2000))
def test_more_load_never_asks_for_fewer(
    fleet: Fleet, tokens: float, delay: float, pause_s: float
) -> None:
    assume(fleet.reports)
    first, *rest = fleet.reports
    heavier = Report(first.queued_tokens + tokens, first.delay_ms + delay)
    loaded = Fleet(
        fleet.num_target,
        fleet.num_running,
        (heavier, *rest),
        fleet.since_up_s,
        fleet.since_down_s,
    )
    assert decide(loaded, TARGETS, pause_s) >= decide(fleet, TARGETS, pause_s)


@given(reports, st.randoms())
def test_which_replica_reports_what_does_not_matter(
    given_reports: tuple[Report, ...], random: Random
) -> None:
    shuffled = list(given_reports)
    random.shuffle(shuffled)
    assert pressure(shuffled, TARGETS) == pressure(given_reports, TARGETS)


@given(fleets, st.floats(1, 2000))
def test_a_missing_report_never_removes_a_replica(fleet: Fleet, pause_s: float) -> None:
    assume(len(fleet.reports) < fleet.num_target)
    assert decide(fleet, TARGETS, pause_s) >= fleet.num_target


@given(st.integers(1, 8), st.floats(0, 20))
def test_the_same_load_does_not_add_and_then_remove(num: int, load: float) -> None:
    """Hysteresis: after a change, the load that caused it asks for no change back."""
    after = decide(even(num, load), TARGETS, 120)
    again = decide(even(after, load), TARGETS, 120)
    assert not (num < after > again)
    assert not (num > after < again)


@pytest.mark.parametrize("signal", ["tokens", "delay"])
def test_either_signal_alone_adds_up_to_what_it_asks_for_and_at_most_double(signal: str) -> None:
    def fleet(times: float) -> Fleet:
        tokens, delay = (1000 * times, 0.0) if signal == "tokens" else (0.0, 50 * times)
        return Fleet(2, 2, (Report(tokens, delay), Report(0, 0)))

    assert decide(fleet(2.0), TARGETS, 120) == 2
    assert decide(fleet(2.5), TARGETS, 120) == 3
    assert decide(fleet(50.0), TARGETS, 120) == 4


def test_nothing_is_added_while_replicas_start_or_soon_after() -> None:
    report = Report(9000, 0)
    assert decide(Fleet(2, 1, (report,)), TARGETS, 120) == 2
    assert decide(Fleet(2, 2, (report,) * 2, since_up_s=9.9), TARGETS, 120) == 2
    assert decide(Fleet(2, 2, (report,) * 2, since_up_s=10.0), TARGETS, 120) == 4


def test_one_is_removed_when_the_rest_has_room_and_the_pause_is_over() -> None:
    assert decide(even(3, 1.2), TARGETS, 120) == 2  # two would be at 60 %
    assert decide(even(3, 1.21), TARGETS, 120) == 3
    assert decide(even(3, 0, since_up_s=119.0), TARGETS, 120) == 3
    assert decide(even(3, 0, since_down_s=119.0), TARGETS, 120) == 3
    assert decide(even(1, 0), TARGETS, 120) == 1


@given(st.floats(120, 1920), st.floats(0, 1e6))
def test_a_removal_taken_back_doubles_the_pause_within_bounds(pause_s: float, fell: float) -> None:
    after = next_pause(pause_s, fell, TARGETS)
    assert TARGETS.down_pause_s <= after <= TARGETS.longest_pause_s
    assert after == (min(2 * pause_s, 1920) if fell < pause_s else 120)


@pytest.mark.parametrize(
    "wrong",
    [
        {"queued_tokens": 0},
        {"delay_ms": math.nan},
        {"spare_ratio": 1.0},
        {"up_pause_s": -1},
        {"longest_pause_s": 1},
        {"queued_token": 5},
        {"delay_ms": "25"},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"expected .*, got"):
        TokenPolicy(**wrong)


def test_numbers_that_are_none_are_no_report() -> None:
    metrics = {
        "queued_tokens": {"a": 1.0, "b": math.nan, "c": 3.0, "d": 1.0},
        "predicted_delay_ms": {"a": 2.0, "b": 1.0, "d": -1.0},
        "running_requests": {"a": 9.0},
    }
    assert read_reports(metrics) == (Report(1.0, 2.0),)


# --- as Serve calls it -------------------------------------------------------------------------


def context(
    num: int,
    metrics: Mapping[str, Mapping[str, float]],
    **fields: Any,  # noqa: ANN401 - passed on
) -> "AutoscalingContext":
    from ray.serve._private.common import DeploymentID
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    values: dict[str, Any] = {
        "deployment_id": DeploymentID(name="InferenceCore", app_name="trimoe"),
        "deployment_name": "InferenceCore",
        "app_name": "trimoe",
        "current_num_replicas": num,
        "target_num_replicas": num,
        "running_replicas": list("abcdefgh"[:num]),
        "total_num_requests": 10_000.0,  # which must not matter
        "total_queued_requests": 10_000.0,
        "aggregated_metrics": lambda: metrics,
        "raw_metrics": None,
        "capacity_adjusted_min_replicas": 1,
        "capacity_adjusted_max_replicas": 5,
        "policy_state": {},
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": 1000.0,
        "config": AutoscalingConfig(upscale_delay_s=0, downscale_delay_s=0),
    }
    return AutoscalingContext(**values | fields)


def metrics_of(num: int, load: float) -> dict[str, dict[str, float]]:
    named = dict(zip("abcdefgh"[:num], even(num, load).reports, strict=True))
    return {
        "queued_tokens": {name: report.queued_tokens for name, report in named.items()},
        "predicted_delay_ms": {name: report.delay_ms for name, report in named.items()},
    }


@pytest.fixture
def policy(ray_imported: None) -> Policy:
    """The policy after Serve's own pickling and wrapping."""
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve.autoscaling_policy import _apply_autoscaling_config
    from ray.serve.config import AutoscalingPolicy

    settings = {"queued_tokens": 1000, "delay_ms": 50}
    policy = AutoscalingPolicy(
        policy_function="cluster.autoscaling:TokenPolicy", policy_kwargs=settings
    )
    return _apply_autoscaling_config(_resolve_policy_callable(policy))


def test_serve_scales_by_tokens_within_its_bounds_and_not_by_requests(policy: Policy) -> None:
    assert policy(context(2, metrics_of(2, 0.0), last_scale_up_time=990.0))[0] == 2
    assert policy(context(2, metrics_of(2, 2.5)))[0] == 3
    assert policy(context(4, metrics_of(4, 40.0)))[0] == 5
    assert policy(context(3, metrics_of(3, 0.0)))[0] == 2
    assert policy(context(3, {}))[0] == 3


def test_serve_keeps_the_pause_of_a_removal_that_failed(policy: Policy) -> None:
    quiet = metrics_of(3, 0.0)
    times = {"last_scale_down_time": 1000.0, "last_scale_up_time": 1030.0}
    num, state = policy(context(3, quiet, current_time=1200.0, **times))
    assert (num, state["pause_s"]) == (3, 240.0)
    num, state = policy(context(3, quiet, current_time=1260.0, policy_state=state, **times))
    assert (num, state["pause_s"]) == (3, 240.0)  # judged once
    assert policy(context(3, quiet, current_time=1270.0, policy_state=state, **times))[0] == 2
