"""A Serve config onto a running cluster, through Ray's own client of the dashboard, and its fate.

The token, where the cluster wants one, is Ray's business: RAY_AUTH_MODE and RAY_AUTH_TOKEN or
RAY_AUTH_TOKEN_PATH of the caller.  Whether the config is sound is asked before, elsewhere.
"""

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from cluster.errors import ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

PROBE_TIMEOUT_S = 5.0
LOOK_S = 1.0
FAILED: Final = ("DEPLOY_FAILED", "UNHEALTHY")


@dataclass(frozen=True, slots=True)
class AppStatus:
    """What Serve says of an application.

    Args:
        status: NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, DELETING or UNHEALTHY.
        message: Why, if there is a reason.
    """

    status: str
    message: str


def connect(address: str) -> "ServeSubmissionClient":
    """Return Ray's client of the dashboard at this address.

    Raises:
        ConfigurationError: Not an http(s) address, or the token is missing or wrong.
        UnavailableError: Nothing answers there, or it is no Ray dashboard.
    """
    _probe(address)
    import requests  # noqa: PLC0415 - comes with Ray
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # noqa: PLC0415 - Ray
    from ray.exceptions import AuthenticationError  # noqa: PLC0415

    try:
        return ServeSubmissionClient(address)
    except AuthenticationError as error:
        message = (
            f"{address}: expected the cluster's token, got refused; set RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN_PATH"
        )
        raise ConfigurationError(message) from error
    except (OSError, RuntimeError, ValueError, KeyError, requests.RequestException) as error:
        message = f"{address}: expected a Ray dashboard, got {error}"
        raise UnavailableError(message) from error


def _probe(address: str) -> None:
    """Find out soon whether anything listens; Ray's client would wait without end."""
    parts = urlsplit(address)
    try:
        default = {"http": 80, "https": 443}[parts.scheme]
        port = parts.port or default
    except (KeyError, ValueError):
        port = 0
    if not parts.hostname or not port:
        message = f"--address: expected http://HOST:PORT of the Ray dashboard, got {address!r}"
        raise ConfigurationError(message)
    try:
        with socket.create_connection((parts.hostname, port), timeout=PROBE_TIMEOUT_S):
            pass
    except OSError as error:
        message = (
            f"{address}: expected the Ray dashboard, nothing answers ({error}); "
            "start the cluster, or pass its --address"
        )
        raise UnavailableError(message) from error


def submit(client: "ServeSubmissionClient", config: Mapping[str, Any]) -> None:
    """Ask the cluster to run this config; it takes over what changed and removes the rest.

    Raises:
        ConfigurationError: The cluster refuses the config.
        UnavailableError: The cluster went away meanwhile.
    """
    import requests  # noqa: PLC0415 - comes with Ray

    try:
        client.deploy_applications(dict(config))
    except RuntimeError as error:
        message = f"cluster: expected it to accept the config, got {error!s:.500}"
        raise ConfigurationError(message) from error
    except (OSError, requests.RequestException) as error:
        message = f"cluster: expected an answer, got {error!s:.200}"
        raise UnavailableError(message) from error


def statuses(client: "ServeSubmissionClient") -> Mapping[str, AppStatus]:
    """Return the state of every application.

    Raises:
        UnavailableError: The cluster does not answer.
    """
    import requests  # noqa: PLC0415 - comes with Ray

    try:
        details = client.get_serve_details()
    except (OSError, RuntimeError, requests.RequestException) as error:
        message = f"cluster: expected the state of Serve, got {error!s:.200}"
        raise UnavailableError(message) from error
    return {
        name: AppStatus(app["status"], " ".join(str(app.get("message") or "").split()))
        for name, app in details["applications"].items()
    }


def await_running(
    client: "ServeSubmissionClient",
    names: frozenset[str],
    wait_s: float,
    progress: Callable[[str], None] = lambda _: None,
) -> bool:
    """Wait until these applications run; return whether they do, False if one has failed.

    Args:
        client: As ``connect`` returns it.
        names: The applications.
        wait_s: How long to wait at most.
        progress: Told every change, one line.

    Raises:
        UnavailableError: The cluster does not answer, or the time is over.
    """
    deadline = time.monotonic() + wait_s
    told: dict[str, AppStatus] = {}
    while True:
        now = {name: app for name, app in statuses(client).items() if name in names}
        for name, app in now.items():
            if told.get(name) != app:
                progress(f"{name}: {app.status} {app.message}".strip())
        told = now
        if any(app.status in FAILED for app in now.values()):
            return False
        if now.keys() == names and all(app.status == "RUNNING" for app in now.values()):
            return True
        if time.monotonic() > deadline:
            message = f"cluster: expected {', '.join(sorted(names))} to run within {wait_s:g} s"
            raise UnavailableError(message)
        time.sleep(LOOK_S)
