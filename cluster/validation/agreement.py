"""What several files must agree on: the version of Ray, the Serve config, GPUs, labels, ports."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from cluster.application import DEPLOYMENTS
from cluster.validation.containerfile import argument
from cluster.validation.deploy_file import DeployFile, parse_yaml
from cluster.validation.finding import Finding, join, shown
from cluster.validation.image import is_ours, ray_version
from cluster.validation.launcher import COMMAND_LISTS, start_options
from cluster.validation.rayservice import CLUSTER

SERVE: Final = "serve_config.yaml"
RAYSERVICE: Final = "kuberay/rayservice.yaml"
LAUNCHER: Final = "ray_cluster.yaml"
CONTAINERFILE: Final = "Containerfile"
GPU: Final = "nvidia.com/gpu"

Files = Mapping[str, DeployFile]


def check_agreement(files: Files, ray: str) -> Iterator[Finding]:
    """Yield what files do not agree on; a file that has findings of its own is left out.

    Args:
        files: The sound files, by name.
        ray: Version of the installed Ray.
    """
    for file in files.values():
        for document in file.documents:
            yield from _check_images(file.name, document, ray)
    if CONTAINERFILE in files:
        came = argument(files[CONTAINERFILE], "RAY_VERSION")
        if came != ray:
            yield Finding(CONTAINERFILE, "ARG RAY_VERSION", f"the installed {ray}", str(came))
    if RAYSERVICE in files:
        yield from _check_rayservice(files, ray)
    if LAUNCHER in files and SERVE in files:
        yield from _check_launcher(files[LAUNCHER].document, files[SERVE].document)


def _check_images(file: str, value: object, ray: str, at: str = "") -> Iterator[Finding]:
    """Our image, wherever it is named, brings the installed version of Ray."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _check_images(file, each, ray, join(at, str(key)))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _check_images(file, each, ray, join(at, index))
    elif at.endswith("image") and is_ours(value) and ray_version(value) != ray:
        yield Finding(file, at, f"trimoe/trimoe:VERSION-ray{ray}, the installed Ray", shown(value))


def _check_rayservice(files: Files, ray: str) -> Iterator[Finding]:
    spec = files[RAYSERVICE].document["spec"]
    cluster = spec["rayClusterConfig"]
    if cluster["rayVersion"] != ray:
        path = join(CLUSTER, "rayVersion")
        yield Finding(RAYSERVICE, path, f"the installed {ray}", cluster["rayVersion"])
    (embedded,) = parse_yaml(spec["serveConfigV2"])
    if SERVE in files:
        for path, ours, theirs in differences(files[SERVE].document, embedded):
            at = join("spec.serveConfigV2", path)
            yield Finding(RAYSERVICE, at, f"{shown(ours)} as in {SERVE}", shown(theirs))
    yield from _check_gpus(cluster, embedded)
    yield from _check_cpus(cluster, embedded)


def differences(ours: object, theirs: object, at: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield where two parsed values differ: path and both sides."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            yield from differences(ours.get(key), theirs.get(key), join(at, str(key)))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, join(at, index))
    elif ours != theirs or type(ours) is not type(theirs):
        yield at, ours, theirs


def demand(config: Mapping[str, Any]) -> tuple[float, int, int]:
    """Return what the model core asks for: GPUs per replica, replicas at least and at most."""
    for app in config["applications"]:
        for deployment in app.get("deployments", []):
            if deployment["name"] == DEPLOYMENTS[0]:
                gpus = float(deployment.get("ray_actor_options", {}).get("num_gpus") or 0)
                scaling = deployment.get("autoscaling_config")
                if scaling:
                    return gpus, scaling.get("min_replicas", 1), scaling.get("max_replicas", 1)
                fixed = deployment.get("num_replicas", 1)
                return gpus, fixed, fixed
    return 0.0, 1, 1


def _check_gpus(cluster: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Pods give what Ray announces, and together what the replicas need."""
    least = most = 0.0
    for index, group in enumerate(cluster["workerGroupSpecs"]):
        at = join(CLUSTER, "workerGroupSpecs", index)
        container = group["template"]["spec"]["containers"][0]
        resources = container.get("resources", {})
        given = _count(resources.get("limits", {}).get(GPU))
        where = join(at, "template.spec.containers[0].resources")
        asked = _count(resources.get("requests", {}).get(GPU, given))
        if asked != given:
            yield Finding(
                RAYSERVICE, join(where, "requests", GPU), f"the limit {given}", str(asked)
            )
        announced = _count(group["rayStartParams"].get("num-gpus", given))
        if announced != given:
            path = join(at, "rayStartParams.num-gpus")
            yield Finding(RAYSERVICE, path, f"the {given} of the pod's limits", str(announced))
        least += given * group["minReplicas"]
        most += given * group["maxReplicas"]
    gpus, lowest, highest = demand(config)
    for name, have, need in (("minReplicas", least, lowest), ("maxReplicas", most, highest)):
        if have < gpus * need:
            path = join(CLUSTER, "workerGroupSpecs", name)
            expected = f"GPUs for {need} replicas of {gpus:g}"
            yield Finding(RAYSERVICE, path, expected, f"{have:g} in all groups")


def _check_cpus(cluster: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Replicas fit into a worker pod, and ask for something, so that the head gets none."""
    largest = max(
        _cores(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in cluster["workerGroupSpecs"]
    )
    for number, app in enumerate(config["applications"]):
        for index, deployment in enumerate(app.get("deployments", [])):
            asked = deployment.get("ray_actor_options", {}).get("num_cpus", 1)
            if not 0 < asked <= largest:
                place = join("applications", number, "deployments", index, "ray_actor_options")
                path = join("spec.serveConfigV2", place, "num_cpus")
                expected = f"more than 0, at most the {largest:g} of a worker"
                yield Finding(RAYSERVICE, path, expected, str(asked))


def _check_launcher(launcher: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Finding]:
    gpus, _, highest = demand(config)
    options = start_options(launcher[COMMAND_LISTS[1]]) or {}
    announced = _count(options.get("--num-gpus"))
    num_workers = len(launcher["provider"]["worker_ips"])
    if num_workers * announced < gpus * highest:
        expected = f"GPUs for {highest} replicas of {gpus:g}"
        got = f"{num_workers} workers of {announced}"
        yield Finding(LAUNCHER, f"{COMMAND_LISTS[1]}: --num-gpus", expected, got)
    lists: Sequence[str] = launcher.get("docker", {}).get("worker_run_options", [])
    if announced and not any(str(option).startswith("--gpus") for option in lists):
        yield Finding(LAUNCHER, "docker.worker_run_options", "--gpus=all", shown(lists))


def _count(value: object) -> int:
    text = str(value)
    return int(text) if text.isdecimal() else 0


def _cores(quantity: object) -> float:
    """Return the cores of a Kubernetes quantity, such as 2 or 500m."""
    text = str(quantity)
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)
