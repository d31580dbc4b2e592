"""Payloads in, messages for the history out: what is odd is counted, said once, and kept.

    malformed, conflicting    set aside with their reason, acknowledged: they can never be read
    duplicate                 known already; acknowledged and left out
    out of order, late        kept; late is what concerns an hour that was forecast before

Knows: the rules.  Does not know: MQTT, files of the history.
"""

import base64
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from apps.maintenance.telemetry.messages import Message, parse, split_topic
from apps.maintenance.telemetry.plant import Plant

LOG = logging.getLogger(__name__)
REJECTED = "rejected.jsonl"
MAX_KNOWN = 200_000  # keys that tell a duplicate; older ones are told by readers of the history
RECEIVED, KEPT, MALFORMED, CONFLICTING = "received", "kept", "malformed", "conflicting"
DUPLICATE, OUT_OF_ORDER, LATE = "duplicate", "out_of_order", "late"


class Intake:
    """Judges payloads; of one thread.

    Args:
        plant: Names and rates.
        prefix: Of the topics.
        rejected: File to which bad payloads are appended, a JSON object per line.
        clock: Returns now, seconds since 1970.
    """

    def __init__(
        self, plant: Plant, prefix: str, rejected: Path, clock: Callable[[], float]
    ) -> None:
        self._plant, self._prefix, self._rejected, self._clock = plant, prefix, rejected, clock
        self.counts: Counter[str] = Counter()
        self.forecast_until_s = -float("inf")
        self._newest: dict[tuple[str, str], float] = {}  # on disk
        self._ahead: dict[tuple[str, str], float] = {}  # of what waits for the disk
        self._known: OrderedDict[tuple[str, str, float, str], Mapping[str, object]] = OrderedDict()
        self._waiting: dict[tuple[str, str, float, str], Mapping[str, object]] = {}
        self._said: set[tuple[str, str]] = set()

    def take(self, topic: str, payload: bytes) -> Message | None:
        """Return the message to keep; None if there is none.

        Raises:
            OSError: A bad payload could not be set aside; it must not be acknowledged.
        """
        self.counts[RECEIVED] += 1
        try:
            machine, kind = split_topic(topic, self._prefix)
            message = parse(machine, kind, payload, self._plant, self._clock())
        except ValueError as error:
            self._set_aside(MALFORMED, topic, payload, str(error))
            return None
        known = self._known.get(message.key) or self._waiting.get(message.key)
        if known is not None:
            if dict(known) == dict(message.facts):
                self._note(DUPLICATE, machine)
            else:
                reason = f"expected {dict(known)!r:.80} as it came first, got another content"
                self._set_aside(CONFLICTING, topic, payload, reason)
            return None
        self._judge_time(message)
        self._waiting[message.key] = message.facts
        return message

    def settle(self, messages: Sequence[Message], *, is_kept: bool) -> None:
        """Note what is on disk by now, so that a repetition of it is left out, or what is not."""
        self._waiting.clear()
        self._ahead.clear()
        if not is_kept:
            return
        self.counts[KEPT] += len(messages)
        for message in messages:
            self._known[message.key] = message.facts
            place = message.machine, message.kind
            self._newest[place] = max(message.time_s, self._newest.get(place, message.time_s))
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _judge_time(self, message: Message) -> None:
        place = message.machine, message.kind
        newest_s = max(each.get(place, message.time_s) for each in (self._newest, self._ahead))
        if message.time_s < newest_s:
            self._note(OUT_OF_ORDER, message.machine)
        self._ahead[place] = newest_s
        if message.time_s <= self.forecast_until_s:
            self._note(LATE, message.machine)

    def _note(self, what: str, machine: str) -> None:
        """Count an oddity; say the first of its sort of each machine."""
        self.counts[what] += 1
        if (what, machine) not in self._said:
            self._said.add((what, machine))
            LOG.warning("%s: %s message; further ones are counted", machine, what)

    def _set_aside(self, what: str, topic: str, payload: bytes, reason: str) -> None:
        record = {
            "received": self._clock(),
            "topic": topic,
            "why": what,
            "reason": reason,
            "payload_base64": base64.b64encode(payload).decode(),
        }
        with self._rejected.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
        self.counts[what] += 1
        LOG.warning("%s: %s message set aside: %s", topic, what, reason)
