"""Keys that a pydantic model does not know: Ray's own models drop them without a word."""

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cluster.validation.finding import Finding, among, join, shown


def check_keys(file: str, value: object, model: type[BaseModel], at: str = "") -> Iterator[Finding]:
    """Yield every key of a mapping, at any depth, that is no field of its model.

    Args:
        file: Name of the file.
        value: The parsed value; what is not a mapping is left to the model itself.
        model: The model of the mapping.
        at: Path of the value in the file.
    """
    if not isinstance(value, Mapping):
        return
    fields = model.model_fields
    for key, each in value.items():
        if key not in fields:
            yield Finding(file, join(at, str(key)), among(str(key), fields), repr(key))
            continue
        for inner, is_list in _models_in(fields[key].annotation):
            if not is_list:
                yield from check_keys(file, each, inner, join(at, key))
            elif isinstance(each, list):
                for index, item in enumerate(each):
                    yield from check_keys(file, item, inner, join(at, key, index))


def _models_in(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:  # noqa: ANN401 - a type
    """Yield the models that an annotation allows, and whether as items of a list."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and origin is None and issubclass(annotation, BaseModel):
        yield annotation, False
    elif origin in (Union, UnionType):
        for each in get_args(annotation):
            yield from _models_in(each)
    elif origin is list:
        for model, _ in _models_in(get_args(annotation)[0]):
            yield model, True


def of_error(file: str, error: ValidationError, at: str = "") -> Iterator[Finding]:
    """Yield a model's errors as findings."""
    for each in error.errors(include_url=False):
        message = each["msg"].removeprefix("Value error, ").rstrip(".")
        got = "that" if each["type"] == "value_error" else shown(each["input"])
        yield Finding(file, join(at, *each["loc"]), f"another value ({message})", got)
