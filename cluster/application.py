"""The application as a Serve config names it: ``cluster.application:build``.

``args`` of the config become ``ApplicationArgs``; a key or a type that does not fit fails the
deployment with its reason.  Serve's own options (replicas, resources, scaling) stay in the
config and are not repeated here.
"""

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.registry import Registry

if TYPE_CHECKING:
    from ray.serve import Application

DEPLOYMENTS: Final = ("InferenceCore", "Gateway")  # what a config may set options of


class ApplicationArgs(BaseModel):
    """What the application serves.

    Args:
        models: Registry of the models: a directory, the same on every node, or a URL.
        model: Name or version to serve whatever the registry's aliases say.
        device: Where the model runs.
        torch_threads: Threads of one CPU step.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    models: Annotated[str, Field(min_length=1)] = "models"
    model: Annotated[str, Field(min_length=1)] | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    torch_threads: Annotated[int, Field(ge=1)] = 1


def build(args: ApplicationArgs) -> "Application":
    """Return the gateway in front of the model core, for Serve to run."""
    from cluster.deployments import InferenceCore  # noqa: PLC0415 - torch; args are checked without
    from cluster.gateway import Gateway  # noqa: PLC0415 - as above
    from cluster.loading import RegistrySource  # noqa: PLC0415 - as above

    source = RegistrySource(Registry(args.models), args.device, args.model)
    application: Application = Gateway.bind(InferenceCore.bind(source, args.torch_threads))
    return application
