"""The cluster launcher's file: Ray's own schema, and what it leaves open."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final

from jsonschema import ValidationError

from cluster.validation.deploy_file import DeployFile
from cluster.validation.finding import Finding, among, join, shown
from cluster.validation.image import EXPECTED_PIN, is_pinned
from cluster.validation.ray_start import check_command, check_environment, parse_command
from cluster.validation.schema import of_error

PROVIDER_KEYS: Final = ("type", "head_ip", "worker_ips")  # Ray accepts any
RUN_OPTIONS: Final = frozenset(
    {
        "--cap-drop",
        "--device",
        "--env",
        "--gpus",
        "--memory",
        "--security-opt",
        "--shm-size",
        "--stop-timeout",
        "--ulimit",
        "--volume",
    }
)
OPTION_LISTS: Final = ("run_options", "head_run_options", "worker_run_options")
COMMAND_LISTS: Final = ("head_start_ray_commands", "worker_start_ray_commands")


def check_launcher(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in a launcher file of provider type ``local``."""
    config = file.document
    if not isinstance(config, Mapping):
        yield Finding(file.name, "", "a mapping", shown(config))
        return
    yield from _check_provider(file.name, config.get("provider"))
    found = list(_check_as_ray_does(file.name, config))
    yield from found
    if not found:
        yield from _check_docker(file.name, config.get("docker", {}))
        yield from _check_commands(file.name, config)


def _check_provider(file: str, provider: object) -> Iterator[Finding]:
    if not isinstance(provider, Mapping):
        yield Finding(file, "provider", "a mapping", shown(provider))
        return
    for key in provider:
        if key not in PROVIDER_KEYS:
            yield Finding(file, join("provider", key), among(key, PROVIDER_KEYS), repr(key))
    for key in PROVIDER_KEYS:
        if key not in provider:
            yield Finding(file, "provider", key, "none")
    if provider.get("type") != "local":
        yield Finding(file, "provider.type", "local", shown(provider.get("type")))


def _check_as_ray_does(file: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    from click import ClickException  # noqa: PLC0415 - comes with Ray
    from ray.autoscaler._private.util import prepare_config, validate_config  # noqa: PLC0415

    provider = config.get("provider")
    if not isinstance(provider, Mapping) or any(key not in provider for key in PROVIDER_KEYS):
        return  # reported; Ray would only say so again
    try:
        validate_config(prepare_config(copy.deepcopy(dict(config))))
    except ValidationError as error:
        yield from of_error(file, error)
    except (ValueError, KeyError, TypeError, RuntimeError, ClickException) as error:
        yield Finding(file, "", "a config that Ray's launcher accepts", str(error))


def _check_docker(file: str, docker: Mapping[str, Any]) -> Iterator[Finding]:
    if not is_pinned(docker.get("image")):
        yield Finding(file, "docker.image", EXPECTED_PIN, shown(docker.get("image")))
    for name in OPTION_LISTS:
        for index, option in enumerate(docker.get(name, [])):
            flag = str(option).partition("=")[0]
            if flag not in RUN_OPTIONS:
                yield Finding(file, join("docker", name, index), among(flag, RUN_OPTIONS), flag)
    yield from check_environment(file, environment(docker), "docker.run_options")


def _check_commands(file: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    for name in COMMAND_LISTS:
        commands = config.get(name, [])
        for index, command in enumerate(commands):
            yield from check_command(file, command, join(name, index))
        if start_options(commands) is None:
            yield Finding(file, name, "a command with ray start", "none")
    head = start_options(config.get(COMMAND_LISTS[0], [])) or {}
    if "--head" not in head:
        yield Finding(file, COMMAND_LISTS[0], "ray start --head", "no --head")
    if head.get("--num-cpus") != "0":
        got = head.get("--num-cpus", "none")
        yield Finding(file, COMMAND_LISTS[0], "--num-cpus=0: the head does no work", got)


def start_options(commands: object) -> Mapping[str, str] | None:
    """Return the options of the ``ray start`` among commands, None if there is none."""
    lines = commands if isinstance(commands, list) else []
    parsed = [parse_command(str(line)) for line in lines]
    return next((each for each in parsed if each is not None), None)


def environment(docker: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that the containers of all nodes get."""
    options = [str(each) for each in docker.get("run_options", [])]
    pairs = [
        each.removeprefix("--env=").partition("=") for each in options if each.startswith("--env=")
    ]
    return {name: value for name, _, value in pairs}
