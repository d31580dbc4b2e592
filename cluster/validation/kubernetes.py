"""Files of Kubernetes objects: each by its kind."""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.validation.deploy_file import DeployFile
from cluster.validation.finding import Finding, join, shown
from cluster.validation.pods import check_spec
from cluster.validation.rayservice import check_rayservice
from cluster.validation.schema import check_kubernetes


def check_objects(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in a file of one or several objects."""
    for index, value in enumerate(file.documents):
        at = f"document {index + 1}" if len(file.documents) > 1 else ""
        if not isinstance(value, Mapping):
            yield Finding(file.name, at, "an object", shown(value))
            continue
        check = check_rayservice if value.get("kind") == "RayService" else _check_builtin
        for found in check(file.name, value):
            path = f"{at}: {found.path}" if at else found.path
            yield Finding(found.file, path, found.expected, found.got)


def _check_builtin(file: str, value: Mapping[str, Any]) -> Iterator[Finding]:
    found = list(check_kubernetes(file, value))
    yield from found
    if found:
        return
    is_namespaced = value["kind"] != "Namespace"
    if is_namespaced and "namespace" not in value["metadata"]:
        yield Finding(file, "metadata", "namespace", "none")
    template = value.get("spec", {}).get("template", {}) if is_namespaced else {}
    if "spec" in template:
        declared = value["spec"].get("volumeClaimTemplates", [])
        claims = frozenset(each["metadata"]["name"] for each in declared)
        yield from check_spec(file, template["spec"], "spec.template.spec", claims)
        yield from _check_selector(file, value["spec"], template)


def _check_selector(
    file: str, spec: Mapping[str, Any], template: Mapping[str, Any]
) -> Iterator[Finding]:
    """A controller that does not select its own pods is refused by the API server."""
    labels = template.get("metadata", {}).get("labels", {})
    for key, wanted in spec.get("selector", {}).get("matchLabels", {}).items():
        if labels.get(key) != wanted:
            path = join("spec.selector.matchLabels", key)
            yield Finding(file, path, f"the template's {labels.get(key)!r}", repr(wanted))
