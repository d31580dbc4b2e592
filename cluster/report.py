"""What a running platform says about itself over HTTP, for commands that look at it."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from cluster.client import api_key_from_environment
from cluster.errors import ConfigurationError

HTTP_TIMEOUT_S = 5.0


def fetch_report(url: str, route: str) -> Mapping[str, Any]:
    """Return what a route answers; $TRIMOE_API_KEY is sent along if there is one.

    Raises:
        ConfigurationError: Nobody answers there, or not as a platform of ours would.
    """
    if not url.startswith(("http://", "https://")):
        message = f"--url: expected http://HOST:PORT, got {url!r}"
        raise ConfigurationError(message)
    key = api_key_from_environment()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    whole = url.rstrip("/") + route
    request = urllib.request.Request(whole, headers=headers)  # noqa: S310 - checked above
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as answer:  # noqa: S310
            report = json.load(answer)
    except urllib.error.HTTPError as error:
        message = f"{whole}: expected an answer, got HTTP {error.code}{_advice(error.code)}"
        raise ConfigurationError(message) from error
    except (OSError, ValueError) as error:
        message = f"{whole}: expected a running platform, got {error}; start it with trimoe serve"
        raise ConfigurationError(message) from error
    if not isinstance(report, dict):
        message = f"{whole}: expected a report, got {report!r:.80}; is that trimoe?"
        raise ConfigurationError(message)
    return report


def _advice(code: int) -> str:
    return "; put a key of the platform into TRIMOE_API_KEY" if code in {401, 403} else ""
