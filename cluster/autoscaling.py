"""How many replicas: by the tokens that wait and the delay they predict, not by requests.

``decide`` is a pure function of what replicas report; ``TokenPolicy`` is its thin form for
Serve's controller, which calls it several times a second and pickles this module by value.

A replica reports ``queued_tokens`` and ``predicted_delay_ms``.  Both add up over replicas, so
each divided by its target per replica is a number of replicas; the larger one is the pressure.

* More replicas: pressure above the number there is.  To the pressure, at most twice as many
  at once, and not while replicas asked for earlier are still starting.
* One fewer: all report, and the pressure would fit into the rest with room to spare.  Short
  queues also look idle at high utilisation, so a removal is a trial: after any change it waits,
  and one that had to be taken back doubles the wait before the next.
* In between, or when reports are missing: as it is.

Not covered: scaling to zero; Serve's own delays and bounds, which apply after this.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cluster.errors import ConfigurationError

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

QUEUED_TOKENS: Final = "queued_tokens"
PREDICTED_DELAY_MS: Final = "predicted_delay_ms"


@dataclass(frozen=True, slots=True)
class Targets:
    """What a replica may carry, and how patient to be.

    Args:
        queued_tokens: Waiting tokens per replica; about a second of its work.
        delay_ms: Predicted delay per replica.
        spare_ratio: One is removed only if the rest would stay below this share of the targets.
        up_pause_s: Between an addition and the next; a new replica has to load and warm up.
        down_pause_s: Between any change and a removal.
        longest_pause_s: To which ``down_pause_s`` grows, doubling, when removals fail.

    Raises:
        ConfigurationError: A value that cannot work.
    """

    queued_tokens: float = 28_000.0  # a CPU core computes 28k tokens/s (design: base preset)
    delay_ms: float = 25.0  # half of the 50 ms that a stream request may take
    spare_ratio: float = 0.6  # at 2 replicas: 60 % of one target before the second goes
    up_pause_s: float = 10.0
    down_pause_s: float = 120.0
    longest_pause_s: float = 1920.0

    def __post_init__(self) -> None:
        for name in ("queued_tokens", "delay_ms", "down_pause_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                message = f"autoscaling {name}: expected a number above 0, got {value}"
                raise ConfigurationError(message)
        if not 0 < self.spare_ratio < 1:
            message = f"autoscaling spare_ratio: expected between 0 and 1, got {self.spare_ratio}"
            raise ConfigurationError(message)
        if not 0 <= self.up_pause_s < math.inf:
            message = f"autoscaling up_pause_s: expected at least 0, got {self.up_pause_s}"
            raise ConfigurationError(message)
        if not self.down_pause_s <= self.longest_pause_s < math.inf:
            message = (
                f"autoscaling longest_pause_s: expected at least down_pause_s "
                f"{self.down_pause_s}, got {self.longest_pause_s}"
            )
            raise ConfigurationError(message)


@dataclass(frozen=True, slots=True)
class Report:
    """What one replica reports, a mean over the look-back time."""

    queued_tokens: float
    delay_ms: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """The replicas as the controller sees them.

    Args:
        num_target: Replicas asked for.
        num_running: Replicas that run; those that start or restart are missing.
        reports: Of the running ones that have reported.
        since_up_s: Seconds since the last addition, infinite if there was none.
        since_down_s: The same for removals.
    """

    num_target: int
    num_running: int
    reports: tuple[Report, ...]
    since_up_s: float = math.inf
    since_down_s: float = math.inf


def pressure(reports: Iterable[Report], targets: Targets) -> float:
    """Return how many replicas the reported load fills up to the targets."""
    reports = tuple(reports)
    tokens = math.fsum(each.queued_tokens for each in reports) / targets.queued_tokens
    delay = math.fsum(each.delay_ms for each in reports) / targets.delay_ms
    return max(tokens, delay)


def decide(fleet: Fleet, targets: Targets, pause_s: float) -> int:
    """Return the number of replicas to ask for; bounds are the caller's.

    Args:
        fleet: The replicas.
        targets: What each may carry.
        pause_s: Present wait before a removal (see ``next_pause``).
    """
    load, num = pressure(fleet.reports, targets), fleet.num_target
    if load > num:
        is_starting = fleet.num_running < num
        if is_starting or fleet.since_up_s < targets.up_pause_s:
            return num
        return min(math.ceil(load), max(1, 2 * num))
    is_quiet = min(fleet.since_up_s, fleet.since_down_s) >= pause_s
    is_known = len(fleet.reports) == fleet.num_running == num
    if num > 1 and is_known and is_quiet and load <= targets.spare_ratio * (num - 1):
        return num - 1
    return num


def next_pause(pause_s: float, up_after_down_s: float, targets: Targets) -> float:
    """Return the wait before removals once an addition has followed the last removal.

    Args:
        pause_s: The wait so far.
        up_after_down_s: Seconds from that removal to the addition; infinite without one.
        targets: Bounds of the wait.
    """
    if up_after_down_s < pause_s:
        return min(2 * pause_s, targets.longest_pause_s)
    return targets.down_pause_s


class TokenPolicy:
    """The policy as the Serve config names it: ``cluster.autoscaling:TokenPolicy``.

    Args:
        **targets: Fields of ``Targets``, from ``policy_kwargs``.

    Raises:
        ConfigurationError: An unknown field, or a value that cannot work.
    """

    def __init__(self, **targets: float) -> None:
        known = Targets.__dataclass_fields__
        for name, value in targets.items():
            if name not in known:
                message = f"policy_kwargs: expected one of {sorted(known)}, got {name!r}"
                raise ConfigurationError(message)
            if isinstance(value, bool) or not isinstance(value, int | float):
                message = f"policy_kwargs {name}: expected a number, got {value!r}"
                raise ConfigurationError(message)
        self.targets = Targets(**targets)

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """Return the number of replicas and the state that Serve hands back next time."""
        pause_s = float(context.policy_state.get("pause_s", self.targets.down_pause_s))
        judged = context.policy_state.get("judged_up")
        last_up, last_down = context.last_scale_up_time, context.last_scale_down_time
        if last_up is not None and last_up != judged:
            fell = last_up - last_down if last_down is not None and last_down <= last_up else None
            pause_s = next_pause(pause_s, math.inf if fell is None else fell, self.targets)
        now = context.current_time
        fleet = Fleet(
            num_target=context.target_num_replicas,
            num_running=len(context.running_replicas),
            reports=read_reports(context.aggregated_metrics or {}),
            since_up_s=_since(last_up, now),
            since_down_s=_since(last_down, now),
        )
        num = decide(fleet, self.targets, pause_s)
        lowest, highest = (
            context.capacity_adjusted_min_replicas,
            context.capacity_adjusted_max_replicas,
        )
        return max(lowest, min(highest, num)), {"pause_s": pause_s, "judged_up": last_up}


def read_reports(metrics: Mapping[str, Mapping[Any, float]]) -> tuple[Report, ...]:
    """Return the reports of the replicas that gave both numbers, each finite and not negative.

    Args:
        metrics: Metric name to replica to value, as Serve aggregates them.
    """
    tokens, delays = metrics.get(QUEUED_TOKENS, {}), metrics.get(PREDICTED_DELAY_MS, {})
    pairs = ((tokens[each], delays[each]) for each in tokens if each in delays)
    return tuple(
        Report(queued, delay)
        for queued, delay in pairs
        if 0 <= queued < math.inf and 0 <= delay < math.inf
    )


def _since(then: float | None, now: float | None) -> float:
    return math.inf if then is None or now is None else max(0.0, now - then)
