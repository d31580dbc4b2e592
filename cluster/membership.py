"""Joining a Ray cluster that already runs, and the platform that is deployed on it.

Ray reads its settings when it is first imported, so ``prepare_to_join`` comes before any import
of it.  All nodes and this process need the same token; it comes from Ray's own places.
"""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConfigurationError

NAMESPACE = "trimoe"
CONNECT_S = 5.0  # for the first answer of a head; Ray itself tries for half a minute
_TOKEN_FILE = Path(".ray") / "auth_token"
_ADDRESS = re.compile(r"(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)")


def choose_address(given: str | None) -> str | None:
    """Return the cluster to join: what was given, else RAY_ADDRESS, else None for none.

    With "auto", too, RAY_ADDRESS comes first: Ray itself would look for traces of whatever
    cluster was last started on this machine, be it long gone.
    """
    named = os.environ.get("RAY_ADDRESS") or None
    return (named or given) if given == "auto" else (given or named)


def prepare_to_join() -> None:
    """Set what Ray reads at import for a cluster of several machines; what is set stays."""
    if "RAY_AUTH_MODE" not in os.environ:
        named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
        has_token = bool(named) or (Path.home() / _TOKEN_FILE).is_file()
        os.environ["RAY_AUTH_MODE"] = "token" if has_token else "disabled"
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # Ray's switch for more than loopback
    }.items():
        os.environ.setdefault(name, value)


def join(address: str) -> None:
    """Connect this process to a running cluster.

    Args:
        address: "auto" for the one on this machine, HOST:PORT of its head, or ray://HOST:PORT.

    Raises:
        ConfigurationError: No such cluster, or it refuses this process.
    """
    _check_reachable(address)
    import ray  # noqa: PLC0415 - reads the environment when imported
    from ray.exceptions import RayError  # noqa: PLC0415

    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        message = (
            f"Ray cluster: expected one at {address}, got {reason[0]:.200}; start it with "
            "`ray start`, and give this process the token of its nodes"
        )
        raise ConfigurationError(message) from error


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be part of a running cluster, and of the platform deployed there, while the block runs.

    Args:
        address: See ``join``.

    Raises:
        ConfigurationError: No such cluster, or the platform is not deployed on it.
    """
    prepare_to_join()
    join(address)
    import ray  # noqa: PLC0415 - as above

    try:
        _check_platform(address)
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address at which nobody listens before Ray waits for it."""
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        if address != "auto":
            message = f"address: expected auto, HOST:PORT or ray://HOST:PORT, got {address!r}"
            raise ConfigurationError(message)
        return
    try:
        socket.create_connection((parts["host"].strip("[]"), int(parts["port"])), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        message = f"Ray cluster: expected one at {address}, got {error}; is its head up?"
        raise ConfigurationError(message) from error


def _check_platform(address: str) -> None:
    from ray import serve  # noqa: PLC0415 - as above

    from cluster.handle import APP_NAME, CORE_NAME  # noqa: PLC0415 - imports ray

    applications = serve.status().applications
    if APP_NAME not in applications or CORE_NAME not in applications[APP_NAME].deployments:
        message = (
            f"platform: expected application {APP_NAME!r} with deployment {CORE_NAME!r} on the "
            f"cluster at {address}, got {sorted(applications)}; trimoe cluster deploy first"
        )
        raise ConfigurationError(message)
