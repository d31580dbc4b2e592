"""What became of every request of a mixed load, and figures of it by task and by phase.

A phase lasts from its begin to that of the next one; a request belongs to the phase in which
its answer or its error came.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from cluster.client import Client
from cluster.errors import TrimoeError
from cluster.schemas import InferRequest, InferResponse
from cluster.versions import STABLE, Aliases

NON_FINITE = "NonFinite"  # an answer with a sequence that has none


@dataclass(frozen=True, slots=True)
class Entry:
    """One request that has ended.

    Args:
        request_id: Decides whether a canary answers.
        task: What was asked.
        wanted: Version or alias that was asked for.
        version: That answered, empty if none did.
        error: Name of the error, empty if there was none.
        asked_s: When it was sent, seconds from the ledger's start.
        ended_s: When the answer or the error came.
    """

    request_id: str
    task: str
    wanted: str
    version: str
    error: str
    asked_s: float
    ended_s: float


class Phase(NamedTuple):
    """A stretch of the run.

    Args:
        name: In the report.
        begin_s: From the ledger's start.
    """

    name: str
    begin_s: float


class Ledger:
    """A client that books what another one says; for several threads.

    Args:
        client: Answers.
        clock: Returns now, seconds.
    """

    def __init__(self, client: Client, clock: Callable[[], float] = time.perf_counter) -> None:
        self._client, self._clock, self._start_s = client, clock, clock()
        self.entries: list[Entry] = []

    @property
    def now_s(self) -> float:
        """Seconds from the start."""
        return self._clock() - self._start_s

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``Client``)."""
        asked_s = self.now_s
        try:
            response = await self._client.infer(request)
        except TrimoeError as error:
            self._book(request, asked_s, "", type(error).__name__)
            raise
        trouble = NON_FINITE if response.status.any() else ""
        self._book(request, asked_s, response.model_version, trouble)
        return response

    def _book(self, request: InferRequest, asked_s: float, version: str, error: str) -> None:
        asked = request.request_id, request.task, request.model_version
        self.entries.append(Entry(*asked, version, error, asked_s, self.now_s))


def by_phase(
    entries: Sequence[Entry], phases: Sequence[Phase], tasks: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return answers, errors and the versions that answered, by phase and task.

    The first phase takes what came before it, the last one what came after.
    """
    begins = [-np.inf, *(phase.begin_s for phase in phases[1:]), np.inf]
    found: dict[str, dict[str, Any]] = {}
    for phase, (begin_s, end_s) in zip(phases, pairwise(begins), strict=True):
        came = [entry for entry in entries if begin_s <= entry.ended_s < end_s]
        found[phase.name] = {
            task: _counts([entry for entry in came if entry.task == task]) for task in tasks
        }
    return found


def _counts(entries: Sequence[Entry]) -> dict[str, Any]:
    answered = [entry for entry in entries if not entry.error]
    return {
        "answers": len(answered),
        "errors": dict(Counter(entry.error for entry in entries if entry.error)),
        "versions": dict(Counter(entry.version for entry in answered)),
    }


def on_trial(entries: Sequence[Entry], begin_s: float, end_s: float) -> list[Entry]:
    """Return the answered requests of a span that a canary might have answered.

    These were sent after its begin, answered before its end, and asked for the stable version.
    """
    return [
        entry
        for entry in entries
        if begin_s <= entry.asked_s
        and entry.ended_s < end_s
        and entry.wanted == STABLE
        and not entry.error
    ]


def canary_shares(trial: Sequence[Entry], canary: str) -> dict[str, dict[str, float]]:
    """Return how many answers each task had on trial, and the canary's share of them."""
    asked = Counter(entry.task for entry in trial)
    taken = Counter(entry.task for entry in trial if entry.version == canary)
    return {
        task: {"answers": num, "share": round(taken[task] / num, 4)} for task, num in asked.items()
    }


def followed_s(
    entries: Sequence[Entry], before: Aliases, after: Aliases, written_s: float
) -> float | None:
    """Return the seconds until an answer that only new aliases explain; None if there is none.

    Args:
        entries: What has ended.
        before: The aliases until then.
        after: The ones that were written.
        written_s: When.
    """
    ends_s = [
        entry.ended_s
        for entry in entries
        if entry.asked_s >= written_s
        and entry.wanted == STABLE
        and entry.version == after.resolve(STABLE, entry.request_id)
        and entry.version != before.resolve(STABLE, entry.request_id)
    ]
    return min(ends_s) - written_s if ends_s else None
