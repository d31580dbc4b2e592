"""The builder a Serve config names: typed arguments in, the two deployments out."""

from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from cluster.application import DEPLOYMENTS, ApplicationArgs, build
from cluster.loading import RegistrySource
from cluster.registry import Registry

if TYPE_CHECKING:
    from ray.serve.deployment import Deployment


def built(args: dict[str, Any]) -> "list[Deployment]":
    """The deployments, by Serve's own way from ``args`` of a config to a graph."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve._private.build_app import build_app

    assert isinstance(build, FunctionType)
    application = call_user_app_builder_with_args_if_necessary(build, args)
    return build_app(application, name="trimoe").deployments


@pytest.mark.usefixtures("ray_imported")
def test_serve_builds_the_gateway_over_one_core_from_the_arguments() -> None:
    args = {"models": "some/where", "model": "fraud", "torch_threads": 2}
    deployments = {each.name: each for each in built(args)}
    assert sorted(deployments) == sorted(DEPLOYMENTS)
    source, threads = tuple(deployments["InferenceCore"].init_args)
    assert threads == 2
    assert source == RegistrySource(Registry("some/where"), "cpu", "fraud")


@pytest.mark.parametrize(
    "wrong",
    [
        {"modles": "x"},
        {"device": "gpu"},
        {"torch_threads": 0},
        {"torch_threads": "2"},
        {"models": ""},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ApplicationArgs.model_validate(wrong)
