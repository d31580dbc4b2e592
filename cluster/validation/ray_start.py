"""What Ray reads without complaint whatever it is: options of ``ray start``, and its environment.

A misspelt RAY_ variable is silently nothing, so files may set only those that are listed here;
a test looks each up in the installed Ray.
"""

import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

from cluster.validation.finding import Finding, among, join

AUTH_MODE: Final = "RAY_AUTH_MODE"
DRAIN_S: Final = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
VARIABLES: Final = frozenset(
    {
        AUTH_MODE,
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        DRAIN_S,
        "RAY_REDIS_ADDRESS",
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED",
        "RAY_USAGE_STATS_ENABLED",
        "RAY_gcs_rpc_server_reconnect_timeout_s",
    }
)


@cache
def options() -> Mapping[str, bool]:
    """Return the options of ``ray start``, and whether each takes a value."""
    from ray.scripts.scripts import start  # noqa: PLC0415 - Ray

    flags: dict[str, bool] = {}
    for parameter in start.params:
        takes_value = not getattr(parameter, "is_flag", False)
        flags |= dict.fromkeys([*parameter.opts, *parameter.secondary_opts], takes_value)
    return flags


def check_environment(file: str, names: Mapping[str, Any], at: str) -> Iterator[Finding]:
    """Yield variables that Ray does not read, and an authentication mode that is not token.

    Args:
        file: Name of the file.
        names: The variables; values may be anything.
        at: Path of the variables in the file.
    """
    for name in names:
        if name.startswith("RAY_") and name not in VARIABLES:
            yield Finding(file, join(at, name), among(name, VARIABLES), repr(name))
    mode = names.get(AUTH_MODE)
    if mode != "token":
        yield Finding(file, join(at, AUTH_MODE), "token", repr(mode) if mode else "none")


def check_params(file: str, params: Mapping[str, Any], at: str) -> Iterator[Finding]:
    """Yield parameters that ``ray start`` does not have (KubeRay's form, without dashes)."""
    known = {option.removeprefix("--") for option in options()}
    for name, value in params.items():
        if name not in known:
            yield Finding(file, join(at, name), among(name, known), repr(name))
        if name.startswith("num-") and not str(value).isdecimal():
            yield Finding(file, join(at, name), "a whole number", repr(value))


def parse_command(command: str) -> Mapping[str, str] | None:
    """Return the options of the ``ray start`` in a shell command, None if there is none."""
    words = _words(command)
    starts = [i for i in range(len(words) - 1) if words[i : i + 2] == ["ray", "start"]]
    if not starts:
        return None
    found: dict[str, str] = {}
    words = words[starts[0] + 2 :]
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not equals and options().get(name, False) and words:
            value = words.pop(0)
        found[name] = value
    return found


def check_command(file: str, command: str, at: str) -> Iterator[Finding]:
    """Yield what ``ray start`` in a shell command would not accept."""
    found = parse_command(command) or {}
    known = {name.removeprefix("--") for name in options()}
    for name in found:
        if name not in options():
            expected = among(name.removeprefix("--"), known)
            yield Finding(file, at, f"option {expected} of ray start", repr(name))
    yield from check_params(
        file, {n.removeprefix("--"): v for n, v in found.items() if n in options()}, at
    )


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command.replace(";", " ; "))
    except ValueError:
        return command.split()
