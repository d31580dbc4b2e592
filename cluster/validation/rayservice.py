"""KubeRay's RayService: a strict schema of the keys we use, its pods, and the config it embeds.

Written against KubeRay 1.5 to 1.7.  Not covered: what only the operator or a cluster can know,
such as whether Secrets, storage and GPUs exist.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.validation.deploy_file import parse_yaml
from cluster.validation.finding import Finding, join
from cluster.validation.pods import check_template
from cluster.validation.ray_start import check_params
from cluster.validation.schema import check_kubernetes, check_schema
from cluster.validation.serve import check_config

CLUSTER = "spec.rayClusterConfig"


def check_rayservice(file: str, value: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong in a parsed RayService."""
    found = list(check_schema(file, value, "rayservice"))
    yield from found
    if found:
        return
    metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": value["metadata"]}
    yield from check_kubernetes(file, metadata)
    cluster = value["spec"]["rayClusterConfig"]
    yield from _check_embedded(file, value["spec"]["serveConfigV2"])
    yield from _check_head(file, cluster["headGroupSpec"], join(CLUSTER, "headGroupSpec"))
    for index, group in enumerate(cluster["workerGroupSpecs"]):
        yield from _check_group(file, group, join(CLUSTER, "workerGroupSpecs", index))
    yield from _check_autoscaler(file, cluster.get("autoscalerOptions"))


def _check_embedded(file: str, text: str) -> Iterator[Finding]:
    at = "spec.serveConfigV2"
    try:
        (config,) = parse_yaml(text)
    except ValueError as error:
        yield Finding(file, at, "one document of valid YAML", str(error))
    else:
        yield from check_config(file, config, at)


def _check_head(file: str, head: Mapping[str, Any], at: str) -> Iterator[Finding]:
    params, here = head["rayStartParams"], join(at, "rayStartParams")
    yield from check_params(file, params, here)
    if params.get("num-cpus") != "0":
        got = repr(params.get("num-cpus"))
        yield Finding(file, join(here, "num-cpus"), "'0': the head does no work", got)
    yield from check_template(file, head["template"], join(at, "template"))


def _check_group(file: str, group: Mapping[str, Any], at: str) -> Iterator[Finding]:
    yield from check_params(file, group["rayStartParams"], join(at, "rayStartParams"))
    lowest, highest = group["minReplicas"], group["maxReplicas"]
    if lowest > highest:
        yield Finding(file, join(at, "minReplicas"), f"at most maxReplicas {highest}", str(lowest))
    elif not lowest <= group.get("replicas", lowest) <= highest:
        expected = f"between {lowest} and {highest}"
        yield Finding(file, join(at, "replicas"), expected, str(group["replicas"]))
    yield from check_template(file, group["template"], join(at, "template"))


def _check_autoscaler(file: str, options: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Check what KubeRay makes a container of, as one."""
    if options is None:
        return
    at = join(CLUSTER, "autoscalerOptions")
    container = {
        key: options[key] for key in ("resources", "env", "securityContext") if key in options
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x"},
        "spec": {"containers": [{"name": "autoscaler", "image": "x", **container}]},
    }
    for found in check_kubernetes(file, pod):
        path = join(at, found.path.removeprefix("spec.containers[0]").removeprefix("."))
        yield Finding(file, path, found.expected, found.got)
