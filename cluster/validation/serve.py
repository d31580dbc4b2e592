"""The Serve config: Ray's own models, what they let pass, and the application it names."""

import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import isclass, signature
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster import application
from cluster.errors import ConfigurationError
from cluster.validation.deploy_file import DeployFile
from cluster.validation.finding import Finding, among, join, shown
from cluster.validation.keys import check_keys, of_error


def check_serve(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in a file that is a Serve config."""
    if len(file.documents) != 1:
        yield Finding(file.name, "", "one document", str(len(file.documents)))
    else:
        yield from check_config(file.name, file.document)


def check_config(file: str, config: object, at: str = "") -> Iterator[Finding]:
    """Yield what is wrong in a parsed Serve config.

    Args:
        file: Name of the file.
        config: The parsed config.
        at: Path of the config in the file.
    """
    from ray.serve.schema import ServeDeploySchema  # noqa: PLC0415 - Ray

    if not isinstance(config, Mapping):
        yield Finding(file, at, "a mapping", shown(config))
        return
    unknown = list(check_keys(file, config, ServeDeploySchema, at))
    yield from unknown
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are findings of _check_scaling
            ServeDeploySchema.model_validate(_without_policies(config))
    except ValidationError as error:
        yield from of_error(file, error, at)
        return
    for index, app in enumerate(config.get("applications", [])):
        yield from _check_application(file, app, join(at, "applications", index))


def _without_policies(value: object) -> object:
    """Return the value without policies, which Ray's model would import and fail on anyhow."""
    if isinstance(value, Mapping):
        kept = ((k, each) for k, each in value.items() if k != "policy")
        return {key: _without_policies(each) for key, each in kept}
    return [_without_policies(each) for each in value] if isinstance(value, list) else value


def _check_application(file: str, app: Mapping[str, Any], at: str) -> Iterator[Finding]:
    yield from _check_builder(file, app, at)
    names = [each["name"] for each in app.get("deployments", [])]
    is_ours = app["import_path"].partition(":")[0] == application.__name__
    for index, deployment in enumerate(app.get("deployments", [])):
        here, name = join(at, "deployments", index), deployment["name"]
        if is_ours and name not in application.DEPLOYMENTS:
            yield Finding(
                file, join(here, "name"), among(name, application.DEPLOYMENTS), repr(name)
            )
        if names.index(name) != index:
            yield Finding(file, join(here, "name"), "each deployment once", repr(name))
        yield from _check_scaling(file, deployment.get("autoscaling_config"), here)
    if is_ours:
        yield from _check_device(file, app, at)


def _check_builder(file: str, app: Mapping[str, Any], at: str) -> Iterator[Finding]:
    """Find the builder, and whether the arguments fit it."""
    try:
        builder = resolve(app["import_path"])
    except ConfigurationError as error:
        yield Finding(file, join(at, "import_path"), "something to import", str(error))
        return
    if not callable(builder):
        return  # a bound application, without arguments
    args = app.get("args", {})
    for parameter in signature(builder).parameters.values():
        model = parameter.annotation
        if isclass(model) and issubclass(model, BaseModel):
            yield from check_keys(file, args, model, join(at, "args"))
            known = {key: each for key, each in args.items() if key in model.model_fields}
            try:
                model.model_validate(known)
            except ValidationError as error:
                yield from of_error(file, error, join(at, "args"))


def _check_scaling(file: str, config: object, at: str) -> Iterator[Finding]:
    """Build what Serve builds only when it runs: the scaling settings and the policy."""
    from ray.serve.config import AutoscalingConfig  # noqa: PLC0415 - Ray

    if not isinstance(config, Mapping):
        return
    here = join(at, "autoscaling_config")
    known = {key: each for key, each in config.items() if key in AutoscalingConfig.model_fields}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            AutoscalingConfig(**{key: each for key, each in known.items() if key != "policy"})
        except ValidationError as error:
            yield from of_error(file, error, here)
    for warning in caught:
        if warning.category in (DeprecationWarning, FutureWarning):
            yield Finding(file, here, "no warning of Ray", str(warning.message))
    policy = known.get("policy")
    if isinstance(policy, Mapping) and "policy_function" in policy:
        yield from _check_policy(file, policy, join(here, "policy"))


def _check_policy(file: str, policy: Mapping[str, Any], at: str) -> Iterator[Finding]:
    try:
        function = resolve(policy["policy_function"])
    except ConfigurationError as error:
        yield Finding(file, join(at, "policy_function"), "something to import", str(error))
        return
    if isclass(function):
        try:
            function(**policy.get("policy_kwargs", {}))
        except (ConfigurationError, TypeError) as error:
            yield Finding(file, join(at, "policy_kwargs"), "settings of the policy", str(error))


def _check_device(file: str, app: Mapping[str, Any], at: str) -> Iterator[Finding]:
    """A model on a GPU needs one, and one that is not needed is not taken."""
    device = app.get("args", {}).get("device", "cpu")
    for index, deployment in enumerate(app.get("deployments", [])):
        if deployment["name"] == application.DEPLOYMENTS[0]:
            num_gpus = deployment.get("ray_actor_options", {}).get("num_gpus") or 0
            if (num_gpus > 0) != (device == "cuda"):
                path = join(at, "deployments", index, "ray_actor_options.num_gpus")
                expected = "at least a share of a GPU" if device == "cuda" else "0"
                yield Finding(file, path, f"{expected} as args.device is {device}", str(num_gpus))


def resolve(path: object) -> Any:  # noqa: ANN401 - whatever is there
    """Return what an import path names, ``module:name`` or ``module.name``.

    Raises:
        ConfigurationError: Nothing is there.
    """
    module, _, name = str(path).replace(":", ".").rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(str(error)) from error
