"""Which replicas of the model serve, as Serve's controller sees it."""

import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from ray.serve.context import _get_global_client

from cluster.handle import APP_NAME, CORE_NAME

_PATIENCE_S = 90.0
_LOOK_S = 0.1


class Replica(NamedTuple):
    """A replica that is running: warm, healthy and known to the handles."""

    pid: int
    node_id: str


def running_replicas() -> set[Replica]:
    """Return the replicas in the state RUNNING; one that died just now may be among them."""
    client = _get_global_client()
    if client is None:
        return set()
    details = client.get_serve_details()
    found = details["applications"][APP_NAME]["deployments"][CORE_NAME]["replicas"]
    return {Replica(each["pid"], each["node_id"]) for each in found if each["state"] == "RUNNING"}


def await_replicas(
    count: int,
    lost: Collection[Replica] = (),
    *,
    since_s: float,
    meanwhile: Callable[[float], None] = time.sleep,
) -> float:
    """Wait until so many replicas serve; return how long after a moment that is.

    Args:
        count: How many there should be.
        lost: Those that do not count, whatever the controller still believes.
        since_s: The moment, seconds of ``time.monotonic``.
        meanwhile: What to do for some seconds between two looks.

    Raises:
        TimeoutError: It takes longer than a minute and a half.
    """
    while len(running_replicas().difference(lost)) < count:
        if time.monotonic() > since_s + _PATIENCE_S:
            message = f"expected {count} replicas within {_PATIENCE_S:.0f} s"
            raise TimeoutError(message)
        meanwhile(_LOOK_S)
    return round(time.monotonic() - since_s, 2)
