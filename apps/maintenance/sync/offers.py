"""What the signed targets say of bundles: version, who they are for, and how they travel.

    custom of <name>/<version>.tar    version, variant, groups, forms[{path, form, base}],
                                      downgrade{from[], until} where it was permitted
    custom of every other form        of: the name of its bundle

Knows: targets and their custom fields.  Does not know: TUF roles, slots, HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from tuf.api.metadata import TargetFile

from apps.maintenance.sync.deltas import Form
from apps.maintenance.sync.outcomes import Outcome, RefusedError

EVERY_GROUP = "*"


@dataclass(frozen=True, slots=True)
class Route:
    """One form of a bundle.

    Args:
        path: Name of its target.
        form: Which.
        base: sha256 of the bundle it is a difference to; empty if of none.
        num_bytes: To transfer.
    """

    path: str
    form: Form
    base: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Offer:
    """A bundle that was signed.

    Args:
        path: Name of its target.
        version: Of the bundle.
        groups: Fleet groups it is for.
        digest: sha256 of the packed bundle.
        length: Of the packed bundle, bytes.
        routes: Smallest first.
        downgrade_from: Versions from which a box may go back to it.
        downgrade_until: When that permit ends.
    """

    path: str
    version: int
    groups: tuple[str, ...]
    digest: str
    length: int
    routes: tuple[Route, ...]
    downgrade_from: tuple[int, ...] = ()
    downgrade_until: datetime | None = None

    @classmethod
    def from_target(cls, target: TargetFile, targets: Mapping[str, TargetFile]) -> Self:
        """Return what a target says.

        Raises:
            RefusedError: It lacks a field, or names a target that is not signed.
        """
        try:
            custom: Any = target.custom
            routes = [
                Route(each["path"], Form(each["form"]), each["base"], targets[each["path"]].length)
                for each in custom["forms"]
            ]
            permit = custom.get("downgrade", {})
            until = permit.get("until")
            return cls(
                path=target.path,
                version=int(custom["version"]),
                groups=tuple(custom["groups"]),
                digest=target.hashes["sha256"],
                length=target.length,
                routes=tuple(sorted(routes, key=lambda each: each.num_bytes)),
                downgrade_from=tuple(permit.get("from", ())),
                downgrade_until=datetime.fromisoformat(until) if until else None,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            message = f"{target.path}: expected the fields of a bundle, got {error!r:.100}"
            raise RefusedError(Outcome.BUNDLE_INVALID, message) from error

    def is_for(self, group: str) -> bool:
        """Whether boxes of a group may run it."""
        return EVERY_GROUP in self.groups or group in self.groups


def offers_of(targets: Mapping[str, TargetFile]) -> Sequence[Offer]:
    """Return the bundles among signed targets, oldest version first."""
    found = [
        Offer.from_target(target, targets)
        for target in targets.values()
        if "forms" in (target.custom or {})
    ]
    return sorted(found, key=lambda each: each.version)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a box has and may take.

    Args:
        group: Its fleet group.
        version: That serves; 0 if none.
        floor: The highest it ever confirmed.
        pin: The only version it may run; 0 if any.
        failed: sha256 of bundles that proved bad on it, and how.
    """

    group: str
    version: int
    floor: int
    pin: int
    failed: Mapping[str, str]

    def check(self, offer: Offer, now: datetime) -> None:
        """Pass an offer that may be taken.

        Args:
            offer: What was signed.
            now: The later of the local and the newest signed time.

        Raises:
            RefusedError: It may not; says why.
        """
        if not offer.is_for(self.group):
            detail = f"{offer.path}: expected group {self.group}, got {', '.join(offer.groups)}"
            raise RefusedError(Outcome.NOT_FOR_THIS_GROUP, detail)
        if self.pin and offer.version != self.pin:
            detail = f"{offer.path}: expected version {self.pin} as pinned, got {offer.version}"
            raise RefusedError(Outcome.PINNED, detail)
        if offer.digest in self.failed:
            detail = f"{offer.path}: was given up here before: {self.failed[offer.digest]}"
            raise RefusedError(Outcome.KNOWN_BAD, detail)
        newest = max(self.version, self.floor)
        until = offer.downgrade_until
        is_permitted = self.version in offer.downgrade_from and until is not None and now <= until
        if offer.version < newest and not is_permitted:
            detail = f"{offer.path}: expected version {newest} or later, got {offer.version}"
            raise RefusedError(Outcome.DOWNGRADE, f"{detail}; no signed permit")
