"""Pods: Kubernetes' own schema, and what it allows but we do not."""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.validation.finding import Finding, join, shown
from cluster.validation.image import EXPECTED_PIN, is_ours, is_pinned
from cluster.validation.ray_start import DRAIN_S, check_environment
from cluster.validation.schema import check_kubernetes


def check_template(file: str, template: Mapping[str, Any], at: str) -> Iterator[Finding]:
    """Yield what is wrong in a pod template.

    Args:
        file: Name of the file.
        template: Its ``metadata`` and ``spec``.
        at: Path of the template in the file.
    """
    wrapped = {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "x"},
        "template": template,
    }
    found = list(check_kubernetes(file, wrapped))
    yield from (Finding(f.file, _moved(f.path, at), f.expected, f.got) for f in found)
    if not found:
        yield from check_spec(file, template["spec"], join(at, "spec"))


def check_spec(
    file: str, spec: Mapping[str, Any], at: str, claims: frozenset[str] = frozenset()
) -> Iterator[Finding]:
    """Yield what is unsafe or unpinned in a pod that fits its schema.

    Args:
        file: Name of the file.
        spec: The pod's.
        at: Path of the spec in the file.
        claims: Volumes that are declared beside the template.
    """
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True:
        got = shown(security.get("runAsNonRoot"))
        yield Finding(file, join(at, "securityContext.runAsNonRoot"), "true", got)
    if not security.get("runAsUser"):
        got = shown(security.get("runAsUser"))
        yield Finding(file, join(at, "securityContext.runAsUser"), "a user other than 0", got)
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield Finding(file, join(at, name), "false", "true")
    volumes = {volume["name"] for volume in spec.get("volumes", [])} | claims
    for index, container in enumerate(spec["containers"]):
        here = join(at, "containers", index)
        yield from _check_container(file, container, here)
        for number, mount in enumerate(container.get("volumeMounts", [])):
            if mount["name"] not in volumes:
                path = join(here, "volumeMounts", number, "name")
                yield Finding(file, path, f"one of {sorted(volumes)}", repr(mount["name"]))
        drain_s = float(plain_environment(container).get(DRAIN_S) or 0)
        grace_s = spec.get("terminationGracePeriodSeconds", 30)
        if drain_s and grace_s <= drain_s:
            path = join(at, "terminationGracePeriodSeconds")
            yield Finding(file, path, f"more than the {drain_s:g} s of {DRAIN_S}", str(grace_s))


def _check_container(file: str, container: Mapping[str, Any], at: str) -> Iterator[Finding]:
    if not is_pinned(container.get("image")):
        yield Finding(file, join(at, "image"), EXPECTED_PIN, shown(container.get("image")))
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False:
        path = join(at, "securityContext.allowPrivilegeEscalation")
        yield Finding(file, path, "false", shown(security.get("allowPrivilegeEscalation")))
    if security.get("capabilities", {}).get("drop") != ["ALL"]:
        path = join(at, "securityContext.capabilities.drop")
        yield Finding(file, path, "[ALL]", shown(security.get("capabilities")))
    for name in ("livenessProbe", "readinessProbe"):
        if name not in container:
            yield Finding(file, at, name, "none")
    limits = container.get("resources", {}).get("limits", {})
    for name in ("cpu", "memory"):
        if name not in limits:
            yield Finding(file, join(at, "resources.limits"), name, "none")
    if is_ours(container.get("image")):
        environment = plain_environment(container)
        yield from check_environment(file, environment, join(at, "env"))


def plain_environment(container: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the variables of a container; one that is a reference has no value here."""
    return {each["name"]: each.get("value") for each in container.get("env", [])}


def _moved(path: str, at: str) -> str:
    return join(at, path.removeprefix("template").removeprefix("."))
