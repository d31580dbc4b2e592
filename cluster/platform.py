# ruff: noqa: A005 - imports are absolute; the name is the seam's
"""The platform: a local Ray or one that is joined, the Serve application, and their end.

A local Ray is loopback only unless there are API keys, no dashboard, no usage statistics, quiet.
Ray reads most of its settings when it is first imported, so ``prepare_environment`` comes before
any import of it.
"""

import io
import ipaddress
import logging
import os
import secrets
import socket
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigurationError
from cluster.keys import load_keys
from cluster.membership import NAMESPACE, join, prepare_to_join
from cluster.registry import Registry

if TYPE_CHECKING:
    from cluster.handle import HandleClient
    from cluster.loading import ModelSource

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class PlatformConfig:
    """What to start.

    Args:
        models: Directory or URL of the models.
        model: Name or version to serve; None follows the aliases of ``models``.
        host: Address of the HTTP door.
        port: Its port; None starts no HTTP door.
        device: Where the model runs.
        torch_threads: Threads of one CPU step.
        num_cpus: Logical CPUs Ray may hand out.
        object_store_bytes: Shared memory for large requests.
        api_keys: File of API keys for the HTTP door; None opens it to this machine alone.
        num_replicas: Replicas of the model, spread over the nodes as far as there are any.
        max_replicas_per_node: More of them wait for another node; None leaves it open.
        address: A running cluster to deploy on (see ``cluster.membership.join``) instead of a
            local Ray; ``num_cpus`` and ``object_store_bytes`` are then those of its nodes.
    """

    models: str = "models"
    model: str | None = None
    host: str = LOOPBACK
    port: int | None = 8000
    device: str = "cpu"
    torch_threads: int = 1
    num_cpus: int = 2
    object_store_bytes: int = 256 * 2**20
    api_keys: Path | None = None
    num_replicas: int = 1
    max_replicas_per_node: int | None = None
    address: str | None = None


def prepare_environment() -> None:
    """Set what Ray and Serve read at import; a value the user has set stays."""
    if "RAY_AUTH_MODE" not in os.environ:
        # Replicas listen for pickled calls on all interfaces, and other users share loopback.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # at Ray's 15 anything else on the machine starves replicas
        "RAY_DEDUP_LOGS": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # 100-row requests, p50 ms, 1 and 4 in flight from an async actor on 2 cores:
        # default 5.5 and 13.7, throughput mode 2.8 and 4.9, with 40 % of the CPU per call
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # with it a shutdown drains for 31 s
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for a loopback-only node
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # else the first driver waits for workers started ahead, and for ever if one of them
        # registers too late, as on a busy machine (ray-project/ray#40131; docs/log.md)
        "RAY_prestart_worker_first_driver": "0",
    }.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True, slots=True, eq=False)
class Platform:
    """A running platform.

    Args:
        client: Reaches the model, and what it reports; for async callers and ``infer_blocking``.
        url: Root of the HTTP door, if there is one.
        is_local: Whether Ray was started for it.
    """

    client: "HandleClient"
    url: str | None
    is_local: bool = True

    def stop(self) -> None:
        """Shut the application down, and Ray if it was started for it."""
        _shut_down(is_local=self.is_local)


def start(config: PlatformConfig, source: "ModelSource | None" = None) -> Platform:
    """Start Ray and the application and return when it answers.

    Args:
        config: What to start.
        source: Other models than those ``config`` names.

    Raises:
        ConfigurationError: The port is taken, others than this machine could connect without
            a key, the keys cannot be read, $TRIMOE_KERNELS is unknown, or the replica could not
            start.
        CheckpointError: The weights are missing or altered.
        UnknownModelError: No such model.
    """
    source = source or _checked_source(config)
    if config.port is not None:
        _check_keys(config)
        _check_port(config.host, config.port)
    is_local = config.address is None
    if not is_local:
        prepare_to_join()
    prepare_environment()
    try:
        start_ray(config)
        client = _run_application(config, source)
    except BaseException:
        _shut_down(is_local=is_local)
        raise
    url = None if config.port is None else f"http://{config.host}:{config.port}"
    return Platform(client, url, is_local)


def _checked_source(config: PlatformConfig) -> "ModelSource":
    """Find and verify the model here, where an error is one line and costs no Ray start."""
    from cluster.loading import RegistrySource, kernels_setting  # noqa: PLC0415 - torch

    kernels_setting()
    registry = Registry(config.models)
    if not registry.is_remote:
        registry = Registry(str(Path(config.models).resolve()))
    registry.fetch(config.model or registry.aliases().stable)
    return RegistrySource(registry, config.device, config.model)


def _check_keys(config: PlatformConfig) -> None:
    if config.api_keys is not None:
        load_keys(config.api_keys)
    elif not _is_loopback(config.host):
        message = f"{config.host}: expected API keys, as others could connect; got none; "
        advice = "make some with trimoe keys create, or serve on 127.0.0.1"
        raise ConfigurationError(message + advice)
    elif os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") != "0":
        message = "HAProxy listens on all interfaces: expected API keys, got none; "
        raise ConfigurationError(message + "make some with trimoe keys create")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            message = f"{host}:{port}: expected a free port, got {error.strerror}; pass another"
            raise ConfigurationError(message) from error


def start_ray(config: PlatformConfig) -> None:
    """Start Ray on this machine, quietly, on loopback."""
    import ray  # noqa: PLC0415 - reads the environment when imported

    if config.address is not None:
        join(config.address)
        return
    ray.init(
        address="local",
        num_cpus=max(config.num_cpus, config.num_replicas + 1),  # replicas leave one for workers
        num_gpus=None if config.device == "cuda" else 0,
        object_store_memory=config.object_store_bytes,
        include_dashboard=False,
        configure_logging=True,
        logging_level=logging.ERROR,
        log_to_driver=False,
        namespace=NAMESPACE,
    )


def _run_application(config: PlatformConfig, source: "ModelSource") -> "HandleClient":
    from ray import serve  # noqa: PLC0415 - as above

    from cluster.deployments import InferenceCore  # noqa: PLC0415
    from cluster.gateway import Gateway, GatewaySettings  # noqa: PLC0415
    from cluster.handle import APP_NAME, connect_blocking  # noqa: PLC0415

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    spread: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.max_replicas_per_node is not None:
        spread["max_replicas_per_node"] = config.max_replicas_per_node
    core = InferenceCore.options(
        ray_actor_options={"num_cpus": 1, "num_gpus": int(config.device == "cuda")}, **spread
    ).bind(source, config.torch_threads)
    has_door = config.port is not None
    location = ("HeadOnly" if config.address is None else "EveryNode") if has_door else "NoServer"
    options: dict[str, Any] = {"host": config.host, "location": location}
    serve.start(http_options=options | ({"port": config.port} if has_door else {}))
    keys = config.api_keys and config.api_keys.resolve()
    settings = GatewaySettings(keys, is_open=keys is None)  # checked: then this machine alone
    try:
        serve.run(
            Gateway.bind(core, settings) if has_door else core,
            name=APP_NAME,
            route_prefix="/" if has_door else None,
        )
    except RuntimeError as error:
        reason = [line for line in str(error).splitlines() if "Error" in line] or [str(error)]
        message = f"platform: expected the replica to start, got {reason[-1].strip():.300}"
        raise ConfigurationError(message) from error
    return connect_blocking()


def _shut_down(*, is_local: bool) -> None:
    import ray  # noqa: PLC0415 - as above
    from ray import serve  # noqa: PLC0415

    from cluster.handle import APP_NAME  # noqa: PLC0415

    if ray.is_initialized():
        # While it ends, Ray prints to stdout that its own controller's calls failed.
        with redirect_stdout(io.StringIO()):
            if is_local:
                serve.shutdown()
            else:  # the cluster may hold applications of others
                serve.delete(APP_NAME)
            ray.shutdown()
