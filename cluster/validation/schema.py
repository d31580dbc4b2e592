"""JSON Schema, and its errors as findings: ours in ``schemas/``, Kubernetes' own from a package.

Ours are strict and compact: they know the keys we use, so a new one is added here first.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match

from cluster.validation.finding import Finding, among, join, shown

KUBERNETES_VERSION: Final = "1.34"  # the oldest we say we run on; the package has 1.25 to 1.37
_EXPECTED: Final = {
    "const": "{}",
    "enum": "one of {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "minimum": "at least {}",
    "minItems": "at least {} of them",
    "minLength": "at least {} characters",
    "minProperties": "at least {} keys",
    "pattern": "a match of {}",
    "type": "{}",
}


@cache
def _validator(name: str) -> Draft202012Validator:
    text = files("cluster.validation").joinpath("schemas", f"{name}.json").read_text("utf-8")
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def check_schema(file: str, value: object, name: str, at: str = "") -> Iterator[Finding]:
    """Yield what one of our schemas finds.

    Args:
        file: Name of the file.
        value: The parsed value.
        name: Of the schema, a file in ``schemas/``.
        at: Path of the value in the file.
    """
    for error in sorted(_validator(name).iter_errors(value), key=lambda each: each.json_path):
        yield from of_error(file, error, at)


def check_kubernetes(file: str, value: Mapping[str, Any], at: str = "") -> Iterator[Finding]:
    """Yield what the schema of a built-in kind finds, the first only.

    Args:
        file: Name of the file.
        value: An object with ``apiVersion`` and ``kind``.
        at: Path of the value in the file.
    """
    import kubernetes_validate  # noqa: PLC0415 - only where Kubernetes files are checked

    kind = {"apiVersion": value.get("apiVersion"), "kind": value.get("kind")}
    if not all(isinstance(each, str) for each in kind.values()):
        yield Finding(file, at, "apiVersion and kind", shown(kind))
        return
    try:
        kubernetes_validate.validate(dict(value), KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        yield Finding(
            file, join(at, "kind"), f"a kind of Kubernetes {KUBERNETES_VERSION}", shown(kind)
        )
    except kubernetes_validate.ValidationError as error:
        yield from of_error(file, error, at)


def of_error(file: str, error: ValidationError, at: str = "") -> Iterator[Finding]:
    """Yield a validator's error as findings; of alternatives, the one that fits best."""
    path = join(at, *error.absolute_path)
    instance: Any = error.instance
    if error.context and (best := best_match(_deepest(error.context))) is not None:
        yield from of_error(file, best, at)
    elif error.validator == "additionalProperties" and isinstance(error.schema, Mapping):
        known = error.schema.get("properties", {})
        for key in instance:
            if key not in known:
                yield Finding(file, join(path, str(key)), among(str(key), known), repr(key))
    elif error.validator == "required" and isinstance(error.validator_value, list):
        missing = [key for key in error.validator_value if key not in instance]
        yield Finding(file, path, f"key {missing[0]!r}", "none")
    else:
        template = _EXPECTED.get(str(error.validator))
        value = error.validator_value
        listed = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        expected = template.format(listed) if template else error.message
        yield Finding(file, path, expected, shown(instance))


def _deepest(errors: Iterable[ValidationError]) -> list[ValidationError]:
    """Return the errors that lie deepest: the alternative that was meant is the one entered."""
    errors = list(errors)
    depth = max(len(each.absolute_path) for each in errors)
    return [each for each in errors if len(each.absolute_path) == depth]
