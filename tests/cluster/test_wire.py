"""Both wire forms give back what went in, and refuse everything else in one way."""

import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cluster import wire
from cluster.errors import InvalidRequestError
from cluster.schemas import InferRequest, InferResponse, ServiceClass, Timings

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@st.composite
def requests(draw: st.DrawFn) -> InferRequest:
    lengths = draw(st.lists(st.integers(0, 3), max_size=5))
    width = draw(st.integers(0, 3))
    rows = sum(lengths)
    return InferRequest(
        request_id=draw(st.text(min_size=1, max_size=10)),
        tenant="t",
        task="fraud",
        features=draw(hnp.arrays(np.float32, (rows, width), elements=FLOATS)),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        extras={
            name: draw(hnp.arrays(dtype, (len(lengths), 2), elements=st.integers(0, 100)))
            for name, dtype in draw(
                st.dictionaries(
                    st.text(max_size=5), st.sampled_from(sorted(wire.DTYPES)), max_size=3
                )
            ).items()
        },
        service_class=draw(st.sampled_from(list(ServiceClass))),
        deadline_ms=draw(st.floats(0.1, 1e6)),
    )


def response() -> InferResponse:
    return InferResponse(
        request_id="r",
        outputs=np.array([[1.5, np.nan], [2.0, -3.0]], dtype=np.float32),
        cu_seqlens=np.array([0, 1, 2], dtype=np.int32),
        status=np.array([1, 0], dtype=np.uint8),
        model_version="v1",
        timings=Timings(0.25, 7.5),
        tokens_per_expert=np.array([[4, 0, 2]], dtype=np.int64),
    )


def same(ours: object, theirs: object) -> bool:
    """Compare two wire objects field by field, arrays bit for bit up to NaN."""
    names = [name for name in type(ours).__slots__ if name != "extras"]  # type: ignore[attr-defined]
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in names]
    mine, other = getattr(ours, "extras", {}), getattr(theirs, "extras", {})
    pairs += [(mine[name], other[name]) for name in mine]
    equal = (
        a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        if isinstance(a, np.ndarray)
        else a == b
        for a, b in pairs
    )
    return set(mine) == set(other) and all(equal)


@given(requests())
def test_binary_request_comes_back_equal(request: InferRequest) -> None:
    assert same(wire.decode_request(wire.encode_request(request)), request)


@given(requests())
def test_json_request_comes_back_equal_but_for_infinities(request: InferRequest) -> None:
    back = wire.request_from_json(wire.request_to_json(request))
    features = np.where(np.isfinite(request.features), request.features, np.float32(np.nan))
    assert np.array_equal(back.features, features, equal_nan=True)
    assert same(wire.request_from_json(wire.request_to_json(back)), back)


def test_response_comes_back_equal_in_both_forms() -> None:
    assert same(wire.decode_response(wire.encode_response(response())), response())
    assert same(wire.response_from_json(wire.response_to_json(response())), response())


def refused(data: bytes) -> None:
    """Decode as everything; whatever comes, it is one error."""
    for decode in (
        wire.decode_request,
        wire.decode_response,
        wire.request_from_json,
        wire.response_from_json,
    ):
        with pytest.raises(InvalidRequestError):
            decode(data)


@given(st.binary(max_size=200))
@example(b"")
@example(b"[" * 50_000)
@example(b"9" * 5000)
def test_random_bytes_are_refused(data: bytes) -> None:
    refused(data)


@settings(max_examples=200)
@given(requests(), st.data())
def test_any_changed_cut_or_longer_message_is_refused(
    request: InferRequest, data: st.DataObject
) -> None:
    message = bytearray(wire.encode_request(request))
    position = data.draw(st.integers(0, len(message) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    if change == "flip":
        message[position] ^= data.draw(st.integers(1, 255))
    elif change == "cut":
        del message[position:]
    else:
        message += b"\0" * (position + 1)
    refused(bytes(message))


def sealed(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """A message with a correct checksum around any header."""
    text = json.dumps(header).encode()
    size = len(text) if length is None else length
    check = zlib.crc32(size.to_bytes(4, "little") + text + body)
    return wire.PREFIX.pack(wire.MAGIC, check, size) + text + body


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = ["request_id", "tenant", "task", "service_class", "deadline_ms", "model_version"]


@pytest.mark.slow
@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON_VALUES),
    st.lists(
        st.tuples(
            st.sampled_from(["features", "cu_seqlens", "extras.x", "other"]),
            st.sampled_from([*sorted(wire.DTYPES), "object", "float16"]) | JSON_VALUES,
            st.lists(st.integers(-2, 2**70), max_size=6) | JSON_VALUES,
        )
        | JSON_VALUES,
        max_size=4,
    )
    | JSON_VALUES,
    st.binary(max_size=16),
)
def test_intact_message_with_any_wrong_header_is_refused(
    fields: dict[str, Any], arrays: object, body: bytes
) -> None:
    fields.setdefault("unknown", 1)
    refused(sealed({"fields": fields, "arrays": arrays}, body))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [([2**40, 2**40], "float32"), ([-1, 3], "float32"), ([True, 3], "int32"), ([1, 3], "object")],
)
def test_impossible_array_is_refused_before_anything_is_allocated(
    shape: list[int], dtype: str
) -> None:
    header = {"fields": {}, "arrays": [["features", dtype, shape]]}
    refused(sealed(header))


def test_header_longer_than_allowed_is_refused() -> None:
    refused(sealed("x" * wire.MAX_HEADER_BYTES))
    refused(sealed({}, length=2**32 - 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("deadline_ms", True),
        ("deadline_ms", 10**400),
        ("service_class", "urgent"),
        ("task", 7),
        ("features", {"dtype": "float32", "shape": [1, 1], "values": ["1.5"]}),
        ("features", {"dtype": "float32", "shape": [1, 1], "values": [1e300]}),
        ("features", {"dtype": "float32", "shape": [1, 1], "values": [1.0, 2.0]}),
        ("cu_seqlens", {"dtype": "int32", "shape": [2], "values": [0, 2**40]}),
        ("cu_seqlens", {"dtype": "int32", "shape": [2], "values": [0, 1.0]}),
        ("colour", "red"),
    ],
)
def test_json_request_with_a_wrong_field_is_refused(field: str, value: object) -> None:
    good = {
        "request_id": "r",
        "tenant": "t",
        "task": "fraud",
        "features": {"dtype": "float32", "shape": [1, 1], "values": [1.5]},
        "cu_seqlens": {"dtype": "int32", "shape": [2], "values": [0, 1]},
    }
    assert wire.request_from_json(json.dumps(good).encode()).features[0, 0] == 1.5
    refused(json.dumps(good | {field: value}).encode())
