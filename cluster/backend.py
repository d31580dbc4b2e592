"""What the HTTP API stands on: a client, what the core reports, and where it writes."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.client import Client
from cluster.recorder import NullRecorder, Recorder

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Backend:
    """Everything behind the API.

    Args:
        client: Answers requests.
        status: Returns what the model core reports; raises ``UnavailableError``.
        metrics_page: Returns Prometheus text; raises ``UnavailableError``.
        recorder: Takes metrics.
        log: Takes a line per request.
    """

    client: Client
    status: Callable[[], Awaitable[Mapping[str, Any]]]
    metrics_page: Callable[[], Awaitable[bytes]]
    recorder: Recorder = field(default_factory=NullRecorder)
    log: logging.Logger = LOG
