"""One attempt to bring a model to this box: verify, fetch, prove, switch.

    refresh trust -> choose an offer -> check that it may be taken -> fetch its smallest form
    -> compare its hash -> spare slot -> golden batch -> pointer

Every way out is an ``Outcome``; all but the last step leave the active slot alone.

Knows: the order of the steps.  Does not know: HTTP, TUF, files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from apps.maintenance.edge.forecast import Forecaster
from apps.maintenance.edge.slots import Slots
from apps.maintenance.sync.deltas import decode
from apps.maintenance.sync.offers import Offer, Route, Standing, offers_of
from apps.maintenance.sync.outcomes import MODEL_FAULTS, Outcome, RefusedError
from apps.maintenance.sync.trust import Mirror, Trusted, TrustStore

Note = Callable[[str, str], None]  # event, detail
_TRY_NEXT_FORM = {Outcome.TARGET_ALTERED, Outcome.DELTA_ALTERED, Outcome.HTTP_ERROR}


@dataclass(frozen=True, slots=True)
class Membership:
    """What this box is in the fleet.

    Args:
        group: Its fleet group.
        pin: The only version it may run; 0 if any.
    """

    group: str
    pin: int = 0


class Updates:
    """Brings models to the slots of this box.

    Args:
        slots: Where they go.
        trust: What is believed of the repository.
        membership: What this box may take.
        note: Told of events on the way; the outcome is returned.
        now: Returns the time of the local clock.
    """

    def __init__(
        self,
        slots: Slots,
        trust: TrustStore,
        membership: Membership,
        note: Note,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        self._slots = slots
        self._trust = trust
        self._membership = membership
        self._note = note
        self._now = now or (lambda: datetime.now(UTC))

    def attempt(self, mirror: Mirror, wanted: str | None) -> Outcome:
        """Make one attempt.

        Args:
            mirror: Where to read.
            wanted: Name of the bundle to take; None for the newest this box may take.

        Returns:
            ``UP_TO_DATE`` or ``SWITCHED``.

        Raises:
            RefusedError: Any other end.
        """
        trusted = self._trust.refresh(mirror)
        offer = self._choose(offers_of(trusted.targets), wanted)
        pointer = self._slots.pointer
        if offer is None or offer.digest == pointer.digest:
            return Outcome.UP_TO_DATE
        times = [each for each in (self._now(), self._trust.signed_at) if each is not None]
        self._standing().check(offer, max(times))
        packed = self._fetch(trusted, offer)
        try:
            info = self._slots.stage(packed)
            Forecaster(self._slots.folder(self._slots.spare)).prove()
        except RefusedError as refusal:
            if refusal.outcome in MODEL_FAULTS:
                self._slots.condemn(offer.digest, refusal.outcome)
            raise
        self._slots.switch(packed, info)
        return Outcome.SWITCHED

    def _choose(self, offers: Sequence[Offer], wanted: str | None) -> Offer | None:
        if wanted is not None:
            named = [each for each in offers if each.path == wanted]
            if not named:
                detail = f"{wanted}: expected among the signed bundles"
                raise RefusedError(Outcome.TARGET_MISSING, detail)
            return named[0]
        group, pin = self._membership.group, self._membership.pin
        mine = [each for each in offers if each.is_for(group) and pin in {0, each.version}]
        newest = mine[-1] if mine else None
        is_newer = newest is not None and newest.version >= self._slots.pointer.floor
        return newest if is_newer else None

    def _standing(self) -> Standing:
        pointer = self._slots.pointer
        return Standing(
            group=self._membership.group,
            version=pointer.version,
            floor=pointer.floor,
            pin=self._membership.pin,
            failed=pointer.failed,
        )

    def _fetch(self, trusted: Trusted, offer: Offer) -> bytes:
        """Return the bundle by the smallest form that works."""
        refusal = RefusedError(Outcome.TARGET_MISSING, f"{offer.path}: expected a form to fetch")
        for route in offer.routes:
            base = self._slots.base(route.base) if route.base else b""
            if base is None:
                continue
            try:
                return self._fetch_form(trusted, offer, route, base)
            except RefusedError as error:
                refusal = error
                if error.outcome not in _TRY_NEXT_FORM:
                    break
                self._note(error.outcome, error.detail)
        raise refusal

    def _fetch_form(self, trusted: Trusted, offer: Offer, route: Route, base: bytes) -> bytes:
        data = trusted.download(route.path)
        packed = decode(route.form, data, base, length=offer.length, sha256=offer.digest)
        detail = f"{route.path}: {len(data)} bytes as {route.form} for {offer.length}"
        self._note("fetched", detail)
        return packed
