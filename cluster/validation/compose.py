"""The compose file: the Compose specification, strictly, and our own rules.

Its parser is the ``compose-spec`` package, which refuses keys that the specification does not
have.  Not covered: whether images exist, and variables of the caller's environment.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

import yaml

from cluster.validation.deploy_file import DeployFile
from cluster.validation.finding import Finding, among, join, shown
from cluster.validation.image import EXPECTED_PIN, is_ours, is_pinned
from cluster.validation.ray_start import check_command, check_environment

LOOPBACK: Final = "127.0.0.1:"
_PLACE = re.compile(r" at line \d+ column \d+$")
_UNKNOWN_KEY = re.compile(r'extension key `([^`]*)` does not start with "x-"')


def check_compose(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in a compose file."""
    config = file.document
    if not isinstance(config, Mapping):
        yield Finding(file.name, "", "a mapping", shown(config))
        return
    found = list(_check_specification(file.name, config))
    yield from found
    if found:
        return
    services = config["services"]
    for name, service in services.items():
        at = join("services", name)
        yield from _check_service(file.name, service, at)
        yield from _check_environment(file.name, service, at)
        yield from _check_mounts(file, service, at)
        for other in service.get("depends_on", {}):
            if other not in services:
                yield Finding(
                    file.name, join(at, "depends_on"), among(other, services), repr(other)
                )


def _check_specification(file: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    from compose_spec import PyCompose  # noqa: PLC0415 - only where compose files are checked

    try:
        PyCompose.from_yaml(yaml.safe_dump(config)).validate()  # anchors resolved
    except ValueError as error:
        path, colon, reason = _PLACE.sub("", str(error)).partition(": ")
        if not colon or " " in path:
            path, reason = "", _PLACE.sub("", str(error))
        unknown = _UNKNOWN_KEY.fullmatch(reason)
        if unknown:
            expected = "a key of the Compose specification"
            yield Finding(file, join(path, unknown[1]), expected, repr(unknown[1]))
        else:
            yield Finding(file, path, "what the Compose specification says", reason)


def _check_service(file: str, service: Mapping[str, Any], at: str) -> Iterator[Finding]:
    if not is_pinned(service.get("image")):
        yield Finding(file, join(at, "image"), EXPECTED_PIN, shown(service.get("image")))
    if service.get("cap_drop") != ["ALL"]:
        yield Finding(file, join(at, "cap_drop"), "[ALL]", shown(service.get("cap_drop")))
    if "no-new-privileges:true" not in service.get("security_opt", []):
        got = shown(service.get("security_opt"))
        yield Finding(file, join(at, "security_opt"), "no-new-privileges:true", got)
    if service.get("privileged") or str(service.get("user", "")).split(":")[0] in {"0", "root"}:
        yield Finding(file, at, "neither privileged nor root", "one of them")
    for index, port in enumerate(service.get("ports", [])):
        if not str(port).startswith(LOOPBACK):
            yield Finding(file, join(at, "ports", index), f"{LOOPBACK}PORT:PORT", shown(port))
    is_once = service.get("restart") == "no"
    if not is_once and "healthcheck" not in service:
        yield Finding(file, at, "a healthcheck, or restart: 'no' for what ends", "neither")


def _check_environment(file: str, service: Mapping[str, Any], at: str) -> Iterator[Finding]:
    environment = service.get("environment", {})
    if not isinstance(environment, Mapping):
        yield Finding(file, join(at, "environment"), "a mapping", shown(environment))
        return
    if is_ours(service.get("image")):
        yield from check_environment(file, environment, join(at, "environment"))
    command = service.get("command", [])
    for index, line in enumerate(command if isinstance(command, list) else [command]):
        yield from check_command(file, str(line).replace("$$", "$"), join(at, "command", index))


def _check_mounts(file: DeployFile, service: Mapping[str, Any], at: str) -> Iterator[Finding]:
    """A mounted file that is not there becomes an empty folder when the container starts."""
    for index, volume in enumerate(service.get("volumes", [])):
        source = str(volume).partition(":")[0]
        if source.startswith(".") and not (file.path.parent / PurePosixPath(source)).exists():
            yield Finding(file.name, join(at, "volumes", index), "a file beside this one", source)
