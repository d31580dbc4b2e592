"""Whether policies and budgets reach the pods they are written for.

A label or a port that is off by a letter selects nothing, and nothing says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.validation.deploy_file import DeployFile
from cluster.validation.finding import Finding, join, shown

KUBERAY_LABELS: Final = {"ray.io/is-ray-node": "yes"}  # which the operator adds to every pod
SELECTORS: Final = {"NetworkPolicy": "podSelector", "PodDisruptionBudget": "selector"}


@dataclass(frozen=True, slots=True)
class Pod:
    """What is known of a kind of pod: its labels and the ports it declares."""

    labels: Mapping[str, str]
    ports: frozenset[int]


def check_reach(files: Mapping[str, DeployFile]) -> Iterator[Finding]:
    """Yield selectors that match no pod of the files, and ports that no such pod has.

    Args:
        files: The sound files, by name.
    """
    objects = [
        (file.name, document)
        for file in files.values()
        if file.name.startswith("kuberay/")
        for document in file.documents
    ]
    pods = [pod for _, value in objects for pod in pods_of(value)]
    if not any(value["kind"] == "RayService" for _, value in objects):
        return  # that file has findings of its own
    for file, value in objects:
        key = SELECTORS.get(value["kind"])
        if key is not None:
            name = f"{value['kind']} {value['metadata']['name']}"
            yield from _check_object(file, name, value["spec"], key, pods)


def pods_of(value: Mapping[str, Any]) -> Iterator[Pod]:
    """Yield the pods that an object makes."""
    spec = value.get("spec", {})
    if value["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        head = KUBERAY_LABELS | {"ray.io/node-type": "head"}
        yield _pod(cluster["headGroupSpec"]["template"], head)
        for group in cluster["workerGroupSpecs"]:
            added = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}
            yield _pod(group["template"], KUBERAY_LABELS | added)
    elif isinstance(spec.get("template"), Mapping):
        yield _pod(spec["template"], {})


def _pod(template: Mapping[str, Any], added: Mapping[str, str]) -> Pod:
    ports = frozenset(
        port["containerPort"]
        for container in template["spec"]["containers"]
        for port in container.get("ports", [])
    )
    return Pod({**template.get("metadata", {}).get("labels", {}), **added}, ports)


def _selected(selector: Mapping[str, Any], pods: Sequence[Pod]) -> Sequence[Pod]:
    wanted = selector.get("matchLabels", {})
    return [pod for pod in pods if wanted.items() <= pod.labels.items()]


def _check_object(
    file: str, name: str, spec: Mapping[str, Any], key: str, pods: Sequence[Pod]
) -> Iterator[Finding]:
    chosen = _selected(spec[key], pods)
    at = f"{name}: spec"
    if not chosen:
        yield Finding(file, join(at, key), "labels of a pod in these files", shown(spec[key]))
        return
    open_ports = frozenset().union(*(pod.ports for pod in chosen))
    for index, rule in enumerate(spec.get("ingress", [])):
        here = join(at, "ingress", index)
        for number, port in enumerate(rule.get("ports", [])):
            if port.get("port") not in open_ports:
                expected = f"a port of these pods ({', '.join(map(str, sorted(open_ports)))})"
                yield Finding(file, join(here, "ports", number), expected, shown(port.get("port")))
        yield from _check_peers(file, rule.get("from", []), join(here, "from"), pods)
    for index, rule in enumerate(spec.get("egress", [])):
        yield from _check_peers(file, rule.get("to", []), join(at, "egress", index, "to"), pods)


def _check_peers(
    file: str, peers: Sequence[Mapping[str, Any]], at: str, pods: Sequence[Pod]
) -> Iterator[Finding]:
    for index, peer in enumerate(peers):
        is_here = "podSelector" in peer and "namespaceSelector" not in peer
        if is_here and not _selected(peer["podSelector"], pods):
            path = join(at, index, "podSelector")
            yield Finding(file, path, "labels of a pod in these files", shown(peer["podSelector"]))
