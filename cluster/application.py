"""The application as a Serve config names it: ``cluster.application:build``.

``args`` of the config become ``ApplicationArgs``; a key or a type that does not fit fails the
deployment with its reason.  Serve's own options (replicas, resources, scaling) stay in the
config and are not repeated here.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.mirror import SCHEMES, mirror_model

if TYPE_CHECKING:
    from ray.serve import Application

    from cluster.loading import Load, LoadedModel

DEPLOYMENTS: Final = ("InferenceCore", "Gateway")  # what a config may set options of


class ApplicationArgs(BaseModel):
    """What the application serves.

    Args:
        models: Directory of the models, the same on every node, or an http(s) URL.
        model: Name or version; None takes the only one of a directory.
        device: Where the model runs.
        torch_threads: Threads of one CPU step.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    models: Annotated[str, Field(min_length=1)] = "models"
    model: Annotated[str, Field(min_length=1)] | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    torch_threads: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _names_a_model_behind_a_url(self) -> "ApplicationArgs":
        if self.is_remote and self.model is None:
            message = "model: expected its name, as models is a URL, which cannot be listed"
            raise ValueError(message)
        return self

    @property
    def is_remote(self) -> bool:
        """Whether the models are behind a URL."""
        return self.models.startswith(SCHEMES)


def build(args: ApplicationArgs) -> "Application":
    """Return the gateway in front of the model core, for Serve to run."""
    from cluster.deployments import InferenceCore  # noqa: PLC0415 - torch; args are checked without
    from cluster.gateway import Gateway  # noqa: PLC0415 - as above

    application: Application = Gateway.bind(InferenceCore.bind(_load(args), args.torch_threads))
    return application


def _load(args: ApplicationArgs) -> "Load":
    if args.is_remote and args.model is not None:
        return partial(load_remote_model, args.models, args.model, args.device)
    from cluster.loading import load_model  # noqa: PLC0415 - torch

    return partial(load_model, Path(args.models), args.model, args.device)


def load_remote_model(url: str, name: str, device: str) -> "LoadedModel":
    """Copy the model of a URL to this node, verify and load it; runs in the replica.

    Raises:
        CheckpointError: Nothing answers, or what came is not what its manifest says.
    """
    from cluster.loading import load_model  # noqa: PLC0415 - torch

    return load_model(mirror_model(url, name), name, device)
