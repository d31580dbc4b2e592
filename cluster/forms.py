"""The JSON form of one task: typed by its ``TaskSpec``, columns by name, for people and curl.

    {"sequences": [{"rows": [{"amount": 12.5, ...}, ...], "extras": {"context": {...}}}]}

A column without a name is a place in a list instead of a key.  Null stands for a value
that is not known (NaN), in both directions.  The binary form of ``cluster.wire`` carries
the same request at a tenth of the cost.

Does not know: HTTP, tenants, limits.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, create_model

from cluster.names import NAME_PATTERN, REQUEST_ID_PATTERN
from cluster.schemas import MAX_ID_LENGTH, InferRequest, InferResponse, SequenceStatus, ServiceClass
from core_model.tasks import ExtraSpec, TaskSpec

MAX_SEQUENCES = 4096  # a JSON body of more is refused for its length anyway
STRICT: Final = ConfigDict(extra="forbid", allow_inf_nan=False)
STATUS_NAMES: Final = {
    code: name.lower() for name, code in vars(SequenceStatus).items() if name.isupper()
}

Arrays = NDArray[Any]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=MAX_ID_LENGTH)]
RequestId = Annotated[str, Field(pattern=REQUEST_ID_PATTERN, max_length=MAX_ID_LENGTH)]


class TaskForm:
    """Reads requests and writes answers of a task in JSON.

    Args:
        spec: The task.
    """

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec
        title = spec.name.title()
        self._row = _line(f"{title}Row", spec.columns, spec.d_task, "float32")
        self._extras = {name: _Extra(title, name, extra) for name, extra in spec.extras.items()}
        self.body = self._body_model(title)
        self.answer = self._answer_model(title)

    def to_request(self, body: BaseModel, request_id: str, tenant: str) -> InferRequest:
        """Return the request of a body.

        Args:
            body: Of the type ``self.body``.
            request_id: Where the body names none.
            tenant: Where the body names none.

        Raises:
            InvalidRequestError: Row counts that do not go together.
        """
        given: Any = body
        sequences: Sequence[Any] = given.sequences
        lengths = [len(sequence.rows) for sequence in sequences]
        rows = [row for sequence in sequences for row in sequence.rows]
        return InferRequest(
            request_id=given.request_id or request_id,
            tenant=given.tenant or tenant,
            task=self.spec.name,
            features=_to_array(rows, self.spec.d_task, "float32"),
            cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
            extras={name: extra.collect(sequences) for name, extra in self._extras.items()},
            service_class=given.service_class or ServiceClass(self.spec.service_class),
            deadline_ms=given.deadline_ms or self.spec.deadline_ms,
            model_version=given.model_version,
        )

    def to_answer(self, response: InferResponse) -> Mapping[str, Any]:
        """Return what is written to the caller, of the type ``self.answer``."""
        ends = response.cu_seqlens.tolist()
        rows = [
            {name: _known(value) for name, value in zip(self.spec.outputs, row, strict=True)}
            for row in response.outputs.tolist()
        ]
        return {
            "request_id": response.request_id,
            "model_version": response.model_version,
            "queued_ms": response.timings.queued_ms,
            "compute_ms": response.timings.compute_ms,
            "sequences": [
                {"status": STATUS_NAMES.get(code, "unknown"), "rows": rows[begin:end]}
                for code, begin, end in zip(
                    response.status.tolist(), ends[:-1], ends[1:], strict=True
                )
            ],
        }

    def _body_model(self, title: str) -> type[BaseModel]:
        extras = {name: (extra.type, ...) for name, extra in self._extras.items()}
        fields: dict[str, Any] = {"rows": (_list_of(self._row, 1, self.spec.max_rows), ...)}
        if extras:
            fields["extras"] = (_model(f"{title}Extras", extras), ...)
        sequence = _model(f"{title}Sequence", fields)
        return _model(
            f"{title}Body",
            {
                "sequences": (_list_of(sequence, 1, MAX_SEQUENCES), ...),
                "request_id": (RequestId | None, None),
                "tenant": (Name | None, None),
                "service_class": (ServiceClass | None, None),
                "deadline_ms": (Annotated[float, Field(strict=True, gt=0)] | None, None),
                "model_version": (Name, "stable"),
            },
        )

    def _answer_model(self, title: str) -> type[BaseModel]:
        row = _line(f"{title}Output", self.spec.outputs, len(self.spec.outputs), "float32")
        statuses = sorted(STATUS_NAMES.values())
        sequence = _model(
            f"{title}Result",
            {
                "status": (Annotated[str, Field(description=f"One of {statuses}.")], ...),
                "rows": (_list_of(row), ...),
            },
        )
        return _model(
            f"{title}Answer",
            {
                "request_id": (str, ...),
                "model_version": (str, ...),
                "queued_ms": (float, ...),
                "compute_ms": (float, ...),
                "sequences": (_list_of(sequence), ...),
            },
        )


class _Extra:
    """One extra of a task: the type of its part of a sequence, and how parts become an array."""

    def __init__(self, title: str, name: str, spec: ExtraSpec) -> None:
        line = _line(title + name.title(), spec.columns, spec.width, spec.dtype)
        self.name = name
        self.spec = spec
        self.type: Any = line if spec.per == "sequence" else _list_of(line)

    def collect(self, sequences: Iterable[Any]) -> Arrays:
        """Return the array of all sequences; its length is the replica's to check."""
        parts = [vars(sequence.extras)[self.name] for sequence in sequences]
        lines = parts if self.spec.per == "sequence" else [line for part in parts for line in part]
        return _to_array(lines, self.spec.width, self.spec.dtype)


def _line(title: str, columns: Sequence[str], width: int, dtype: str) -> Any:  # noqa: ANN401 - a type
    """Return the type of one line of an array: an object of its columns, or a list."""
    value = _value_type(dtype)
    if not columns:
        return _list_of(value, width, width)
    # Fields are called by their place: a column may be named like a method of the model.
    fields = {f"c{i}": (value, Field(alias=name)) for i, name in enumerate(columns)}
    return _model(title, fields)


def _list_of(item: Any, shortest: int = 0, longest: int | None = None) -> Any:  # noqa: ANN401 - types
    return Annotated[list[item], Field(min_length=shortest, max_length=longest)]


def _model(title: str, fields: Mapping[str, Any]) -> type[BaseModel]:
    model: type[BaseModel] = create_model(title, __config__=STRICT, **fields)
    return model


def _value_type(dtype: str) -> Any:  # noqa: ANN401 - a type
    """Return the type of a value: what the dtype can hold, or null where it has a NaN."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        largest = float(np.finfo(kind).max)
        return Annotated[float, Field(strict=True, ge=-largest, le=largest)] | None
    bounds = np.iinfo(kind)
    return Annotated[int, Field(strict=True, ge=int(bounds.min), le=int(bounds.max))]


def _to_array(lines: Sequence[Any], width: int, dtype: str) -> Arrays:
    values = [line if isinstance(line, list) else list(vars(line).values()) for line in lines]
    return np.array(values, dtype=dtype).reshape(len(values), width)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
