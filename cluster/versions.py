"""Which version answers a request: aliases, canary and shadow shares, what each version did.

Shares are taken by a hash of the request id, so a retry meets the same version.  Requests
keep the version they were admitted with; a swap therefore needs no pause, and the version
before it stays loaded for an instant rollback.  Pure: no ray, no torch, no clock.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

from cluster.errors import ConfigurationError, UnknownModelError

STABLE, CANARY, SHADOW, PREVIOUS = "stable", "canary", "shadow", "previous"
RECENT = 2000  # latencies kept per version


@dataclass(frozen=True, slots=True)
class Aliases:
    """What is served under which name.

    Args:
        stable: Version that answers by default.
        canary: Version that answers a share of the default requests.
        canary_share: That share, 0 to 1.
        shadow: Version that is asked too and never answers.
        shadow_share: Share of the requests it is asked, 0 to 1.
        previous: Version that was stable before; what a rollback returns to.

    Raises:
        ConfigurationError: A share is out of range, or a canary has none.
    """

    stable: str
    canary: str | None = None
    canary_share: float = 0.0
    shadow: str | None = None
    shadow_share: float = 1.0
    previous: str | None = None

    def __post_init__(self) -> None:
        for name in ("canary_share", "shadow_share"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                message = f"{name}: expected 0 to 1, got {share}"
                raise ConfigurationError(message)
        if (self.canary is None) != (self.canary_share == 0.0):
            message = (
                f"canary: expected a version and a share above 0, or neither, "
                f"got {self.canary!r} and {self.canary_share}"
            )
            raise ConfigurationError(message)

    @property
    def versions(self) -> tuple[str, ...]:
        """Every version that must be loaded, each once, stable first."""
        named = (self.stable, self.canary, self.shadow, self.previous)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def names_of(self, version: str) -> list[str]:
        """Return the aliases of a version."""
        named = {
            STABLE: self.stable,
            CANARY: self.canary,
            SHADOW: self.shadow,
            PREVIOUS: self.previous,
        }
        return [alias for alias, named_version in named.items() if named_version == version]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    def resolve(self, name: str, request_id: str) -> str:
        """Return the version for a request that asks for an alias or a version.

        Raises:
            UnknownModelError: Neither.
        """
        if name == STABLE:
            is_canary = share_of(request_id, CANARY) < self.canary_share
            return self.canary if is_canary and self.canary is not None else self.stable
        named = {CANARY: self.canary, SHADOW: self.shadow, PREVIOUS: self.previous}
        version = named.get(name, name)
        if version not in self.versions:
            message = (
                f"model version: expected {STABLE!r} or one of {list(self.versions)}, got {name!r}"
            )
            raise UnknownModelError(message)
        return version

    def is_shadowed(self, request_id: str) -> bool:
        """Tell whether the shadow is asked this request too."""
        return self.shadow is not None and share_of(request_id, SHADOW) < self.shadow_share

    def promoted(self, version: str) -> "Aliases":
        """Return the aliases with a version as stable and nothing on trial."""
        return Aliases(stable=version, previous=self.stable)

    def rolled_back(self) -> "Aliases":
        """Return the aliases before the last promotion.

        Raises:
            ConfigurationError: There is none to go back to.
        """
        if self.previous is None:
            message = f"rollback: expected a version before {self.stable!r}, there is none"
            raise ConfigurationError(message)
        return Aliases(stable=self.previous, previous=self.stable)


def share_of(request_id: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on the id alone, evenly spread."""
    digest = blake2b(request_id.encode(), digest_size=8, person=salt.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(slots=True)
class VersionRecord:
    """What a version has done since it was loaded.

    Args:
        num_ok: Requests answered.
        num_failed: Requests whose step failed.
        latencies_ms: Of the latest answered requests.
        num_shadowed: Sequences it was asked as a shadow.
        num_disagreed: Of these, the ones whose answer differed beyond the task's tolerance.
    """

    num_ok: int = 0
    num_failed: int = 0
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    num_shadowed: int = 0
    num_disagreed: int = 0

    def report(self) -> dict[str, Any]:
        """Return plain figures."""
        ordered = sorted(self.latencies_ms)

        def quantile(share: float) -> float | None:
            return round(ordered[int(share * (len(ordered) - 1))], 3) if ordered else None

        return {
            "ok": self.num_ok,
            "failed": self.num_failed,
            "p50_ms": quantile(0.5),
            "p99_ms": quantile(0.99),
            "shadowed": self.num_shadowed,
            "disagreed": self.num_disagreed,
        }


@dataclass(frozen=True, slots=True)
class Gate:
    """What a version on trial must show before it may become stable.

    Args:
        min_requests: Requests it has answered or sequences it was shadowed with.
        max_failed_share: Failed requests among its requests.
        max_slowdown: Its p99 over that of the stable version.
        max_disagreed_share: Disagreeing sequences among the shadowed ones.
    """

    min_requests: int = 1000
    max_failed_share: float = 0.0
    max_slowdown: float = 1.2
    max_disagreed_share: float = 0.05

    def objections(self, trial: Mapping[str, Any], stable: Mapping[str, Any]) -> list[str]:
        """Return why a version may not be promoted, from two reports; empty if it may."""
        asked = trial["ok"] + trial["failed"]
        found = []
        if asked + trial["shadowed"] < self.min_requests:
            came = asked + trial["shadowed"]
            found.append(f"expected at least {self.min_requests} requests on trial, got {came}")
        if asked and trial["failed"] / asked > self.max_failed_share:
            found.append(
                f"expected no more than {self.max_failed_share:.1%} failed requests, "
                f"got {trial['failed'] / asked:.1%}"
            )
        if trial["p99_ms"] and stable["p99_ms"]:
            slowdown = trial["p99_ms"] / stable["p99_ms"]
            if slowdown > self.max_slowdown:
                found.append(
                    f"expected a p99 at most {self.max_slowdown} times the stable "
                    f"version's, got {slowdown:.2f} times"
                )
        if trial["shadowed"]:
            share = trial["disagreed"] / trial["shadowed"]
            if share > self.max_disagreed_share:
                found.append(
                    f"expected at most {self.max_disagreed_share:.1%} of the shadowed "
                    f"sequences to disagree, got {share:.1%}"
                )
        return found
