"""How a request and a response look as bytes: a binary form and a JSON form; no pickle.

Binary form, little-endian:

    magic "TRM1" | crc32 of all that follows u32 | header length u32 | header | arrays

The header is JSON: the plain fields, and name, dtype and shape of each array, whose raw
buffers follow in that order without gaps.  Nothing is allocated before every length is
known to fit the bytes that came.  In the JSON form a value that is not finite is null.

Whatever comes, decoding returns a checked object or raises ``InvalidRequestError``.
"""

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequestError
from cluster.schemas import InferRequest, InferResponse, ServiceClass, Timings

BINARY_TYPE: Final = "application/vnd.trimoe.v1"
JSON_TYPE: Final = "application/json"
MAGIC: Final = b"TRM1"
PREFIX: Final = struct.Struct("<4sII")
MAX_MESSAGE_BYTES = 64 * 2**20  # larger studies travel by reference inside the cluster
MAX_HEADER_BYTES = 64 * 2**10
MAX_ARRAYS = 32
MAX_DIMS = 4
DTYPES: Final = {name: np.dtype(name).newbyteorder("<") for name in (
    "float32", "float64", "int32", "int64", "uint8",
)}  # fmt: skip

Arrays = dict[str, NDArray[Any]]
Defaults = Callable[[str], Mapping[str, Any]]  # task -> fields of a request that lacks them
T = TypeVar("T")


def usual_defaults(_: str) -> Mapping[str, Any]:
    """Return the fields of a request that lacks them, whatever its task."""
    return {"service_class": ServiceClass.STREAM, "deadline_ms": 1000.0, "model_version": "stable"}


def encode_request(request: InferRequest) -> bytes:
    """Return the binary form."""
    return _join(_request_fields(request), _request_arrays(request))


def decode_request(data: bytes, defaults: Defaults = usual_defaults) -> InferRequest:
    """Return the request of a binary form.

    Args:
        data: The bytes.
        defaults: Fills in what the request lacks.

    Raises:
        InvalidRequestError: Anything is wrong with the bytes or the fields.
    """
    return _guard(lambda: _build_request(*_split(data), defaults))


def encode_response(response: InferResponse) -> bytes:
    """Return the binary form."""
    return _join(_response_fields(response), _response_arrays(response))


def decode_response(data: bytes) -> InferResponse:
    """Return the response of a binary form.

    Raises:
        InvalidRequestError: Anything is wrong with the bytes or the fields.
    """
    return _guard(lambda: _build_response(*_split(data)))


def request_to_json(request: InferRequest) -> bytes:
    """Return the JSON form."""
    return _join_json(_request_fields(request), _request_arrays(request))


def request_from_json(data: bytes, defaults: Defaults = usual_defaults) -> InferRequest:
    """Return the request of a JSON form (see ``decode_request``).

    Raises:
        InvalidRequestError: Anything is wrong with the text or the fields.
    """
    return _guard(lambda: _build_request(*_split_json(data), defaults))


def response_to_json(response: InferResponse) -> bytes:
    """Return the JSON form."""
    return _join_json(_response_fields(response), _response_arrays(response))


def response_from_json(data: bytes) -> InferResponse:
    """Return the response of a JSON form.

    Raises:
        InvalidRequestError: Anything is wrong with the text or the fields.
    """
    return _guard(lambda: _build_response(*_split_json(data)))


# --- fields and arrays of the two types ---


def _request_fields(request: InferRequest) -> dict[str, Any]:
    return {
        "request_id": request.request_id,
        "tenant": request.tenant,
        "task": request.task,
        "service_class": request.service_class.value,
        "deadline_ms": request.deadline_ms,
        "model_version": request.model_version,
    }


def _request_arrays(request: InferRequest) -> Arrays:
    extras = {f"extras.{name}": array for name, array in request.extras.items()}
    return {"features": request.features, "cu_seqlens": request.cu_seqlens, **extras}


def _build_request(given: dict[str, Any], arrays: Arrays, defaults: Defaults) -> InferRequest:
    task = given["task"]
    _require(isinstance(task, str), "task text", task)
    fields = {**defaults(task), **given}
    request = InferRequest(
        request_id=fields.pop("request_id"),
        tenant=fields.pop("tenant"),
        task=fields.pop("task"),
        service_class=ServiceClass(fields.pop("service_class")),
        deadline_ms=_number(fields.pop("deadline_ms")),
        model_version=fields.pop("model_version"),
        features=arrays.pop("features"),
        cu_seqlens=arrays.pop("cu_seqlens"),
        extras={
            name.removeprefix("extras."): arrays.pop(name)
            for name in list(arrays)
            if name.startswith("extras.")
        },
    )
    _require(not fields and not arrays, "only known fields", sorted([*fields, *arrays]))
    return request


def _response_fields(response: InferResponse) -> dict[str, Any]:
    return {
        "request_id": response.request_id,
        "model_version": response.model_version,
        "queued_ms": response.timings.queued_ms,
        "compute_ms": response.timings.compute_ms,
    }


def _response_arrays(response: InferResponse) -> Arrays:
    return {
        "outputs": response.outputs,
        "cu_seqlens": response.cu_seqlens,
        "status": response.status,
        "tokens_per_expert": response.tokens_per_expert,
    }


def _build_response(fields: dict[str, Any], arrays: Arrays) -> InferResponse:
    _require(isinstance(fields["request_id"], str), "request_id text", fields["request_id"])
    _require(isinstance(fields["model_version"], str), "version text", fields["model_version"])
    _require(arrays["outputs"].ndim == 2, "outputs [R, D]", list(arrays["outputs"].shape))
    _require(arrays["tokens_per_expert"].dtype == np.int64, "tokens_per_expert int64", "other")
    return InferResponse(
        request_id=fields["request_id"],
        model_version=fields["model_version"],
        timings=Timings(_number(fields["queued_ms"]), _number(fields["compute_ms"])),
        outputs=arrays["outputs"],
        cu_seqlens=arrays["cu_seqlens"],
        status=arrays["status"],
        tokens_per_expert=arrays["tokens_per_expert"],
    )


# --- binary form ---


def _join(fields: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    layout = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    header = json.dumps({"fields": fields, "arrays": layout}, separators=(",", ":")).encode()
    body = [_little_endian(array) for array in arrays.values()]
    check = zlib.crc32(header, zlib.crc32(len(header).to_bytes(4, "little")))
    for piece in body:
        check = zlib.crc32(piece, check)
    return b"".join([PREFIX.pack(MAGIC, check, len(header)), header, *body])


def _little_endian(array: NDArray[Any]) -> memoryview:
    _require(array.dtype.name in DTYPES, f"a dtype among {sorted(DTYPES)}", array.dtype)
    raw = np.ascontiguousarray(array, dtype=DTYPES[array.dtype.name])
    return raw.reshape(-1).view(np.uint8).data


def _split(data: bytes) -> tuple[dict[str, Any], Arrays]:
    _require(PREFIX.size <= len(data) <= MAX_MESSAGE_BYTES, "a message of allowed size", len(data))
    magic, check, header_bytes = PREFIX.unpack_from(data)
    _require(magic == MAGIC, f"a message that starts with {MAGIC!r}", magic)
    body_start = PREFIX.size + header_bytes
    _require(header_bytes <= MAX_HEADER_BYTES, "a header of allowed size", header_bytes)
    _require(body_start <= len(data), f"a header of {header_bytes} bytes", "fewer")
    _require(zlib.crc32(memoryview(data)[8:]) == check, "an intact message", "a wrong checksum")
    header = _object(json.loads(data[PREFIX.size : body_start]))
    _require(set(header) == {"fields", "arrays"}, "fields and arrays", sorted(header))
    return dict(_object(header["fields"])), _read_arrays(header["arrays"], data, body_start)


def _read_arrays(layout: object, data: bytes, start: int) -> Arrays:
    _require(isinstance(layout, list), "a list of arrays", type(layout).__name__)
    entries = [_array_entry(entry) for entry in cast("list[object]", layout)]
    _require(len(entries) <= MAX_ARRAYS, f"at most {MAX_ARRAYS} arrays", len(entries))
    needed = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in entries)
    _require(needed == len(data) - start, f"{needed} bytes of arrays", len(data) - start)
    arrays: Arrays = {}
    for name, dtype, shape in entries:
        count = math.prod(shape)
        _require(name not in arrays, "names used once", name)
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += dtype.itemsize * count
    return arrays


def _array_entry(entry: object) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    _require(isinstance(entry, list) and len(entry) == 3, "[name, dtype, shape]", entry)
    name, dtype, shape = cast("list[Any]", entry)
    _require(isinstance(name, str), "a name", name)
    _require(isinstance(dtype, str) and dtype in DTYPES, f"dtype in {sorted(DTYPES)}", dtype)
    _require(isinstance(shape, list) and len(shape) <= MAX_DIMS, "a shape", shape)
    for size in shape:
        _require(type(size) is int and 0 <= size <= MAX_MESSAGE_BYTES, "a size", size)
    return name, DTYPES[dtype], tuple(shape)


# --- JSON form ---


def _join_json(fields: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    values = {
        name: {"dtype": array.dtype.name, "shape": list(array.shape), "values": _to_list(array)}
        for name, array in arrays.items()
    }
    return json.dumps({**fields, **values}, allow_nan=False).encode()


def _to_list(array: NDArray[Any]) -> list[float | int | None]:
    flat = array.reshape(-1).tolist()
    return [value if math.isfinite(value) else None for value in flat]


def _split_json(data: bytes) -> tuple[dict[str, Any], Arrays]:
    _require(len(data) <= MAX_MESSAGE_BYTES, "a message of allowed size", len(data))
    message = _object(json.loads(data))
    fields = {name: value for name, value in message.items() if not isinstance(value, dict)}
    arrays = {name: _json_array(name, message[name]) for name in message if name not in fields}
    return fields, arrays


def _json_array(name: str, value: Mapping[str, Any]) -> NDArray[Any]:
    _require(set(value) == {"dtype", "shape", "values"}, "dtype, shape, values", sorted(value))
    _, dtype, shape = _array_entry([name, value["dtype"], value["shape"]])
    values = value["values"]
    _require(isinstance(values, list), "a list of values", type(values).__name__)
    _require(len(values) == math.prod(shape), f"{math.prod(shape)} values", len(values))
    is_float = dtype.kind == "f"
    for each in values:
        is_number = type(each) is int or (is_float and (each is None or type(each) is float))
        _require(is_number, f"{dtype.name} values", each)
    numbers = [math.nan if each is None else each for each in values]
    with np.errstate(over="raise"):
        return np.array(numbers, dtype=dtype).reshape(shape)


# --- checks ---


def _guard(decode: Callable[[], T]) -> T:
    try:
        return decode()
    except InvalidRequestError:
        raise
    except KeyError as error:
        _refuse(f"expected the field {error}, it is missing")
    except (ValueError, TypeError, OverflowError, RecursionError, FloatingPointError) as error:
        _refuse(f"expected a well-formed message, got: {error!s:.120}")


def _refuse(message: str) -> NoReturn:
    raise InvalidRequestError(message) from None


def _require(condition: bool, expected: str, came: object) -> None:
    if not condition:
        _refuse(f"expected {expected}, got {came!r:.120}")


def _object(value: object) -> dict[str, Any]:
    _require(isinstance(value, dict), "an object", type(value).__name__)
    return cast("dict[str, Any]", value)


def _number(value: object) -> float:
    _require(type(value) in {int, float}, "a number", value)
    return float(cast("float", value))
