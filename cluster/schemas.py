"""Wire types: one request and one response for every task, application and client.

A request carries many ragged sequences at once: row ``i`` of sequence ``b`` is
``features[cu_seqlens[b] + i]``.  Nothing is padded.  Types are frozen and checked
once, where they are built; behind that point nobody checks again.

Knows: shapes, dtypes, ranges.  Does not know: what a task's columns mean
(``core_model.tasks``), how bytes look on a wire (``cluster.wire``), torch, ray.

Legend: R rows, B sequences, D columns of the task, L layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequestError

MAX_ID_LENGTH = 128  # characters; ids travel in logs and metrics


class ServiceClass(StrEnum):
    """What the caller needs: latency of a stream, of a person, or throughput."""

    STREAM = "stream"
    INTERACTIVE = "interactive"
    BATCH = "batch"


class SequenceStatus:
    """Per-sequence outcome codes of a response (uint8)."""

    OK = 0
    NON_FINITE = 1  # the model's output for this sequence is not finite


def _require(condition: bool, expected: str, came: object) -> None:
    if not condition:
        message = f"expected {expected}, got {came}"
        raise InvalidRequestError(message)


def _check_cu_seqlens(cu_seqlens: NDArray[np.int32], num_rows: int) -> None:
    _require(
        cu_seqlens.dtype == np.int32 and cu_seqlens.ndim == 1 and cu_seqlens.size >= 1,
        "cu_seqlens int32 [B+1]",
        f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}",
    )
    ends_meet = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == num_rows
    _require(
        ends_meet and bool((np.diff(cu_seqlens) >= 0).all()),
        f"cu_seqlens rising from 0 to {num_rows}",
        f"{cu_seqlens[:3].tolist()}..{cu_seqlens[-1:].tolist()}",
    )


@dataclass(frozen=True, slots=True, eq=False)
class InferRequest:
    """A ragged batch of sequences of one task, with its class and deadline.

    Args:
        request_id: Unique per logical request; a retry repeats it.
        tenant: Who asks; queues and shares are kept per tenant.
        task: Name in the ``TaskSpec`` registry, such as ``"fraud"``.
        features: Rows of all sequences, float32 [R, D_task].
        cu_seqlens: Row offsets of the sequences, int32 [B+1], from 0 to R.
        extras: Named arrays the task declares, such as ``"context"`` [B, 24].
        service_class: stream, interactive or batch.
        deadline_ms: Milliseconds from receipt until the answer is worthless.
        model_version: A version, or an alias such as ``"stable"``.

    Raises:
        InvalidRequestError: A field disagrees with the above.
    """

    request_id: str
    tenant: str
    task: str
    features: NDArray[np.float32]
    cu_seqlens: NDArray[np.int32]
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    service_class: ServiceClass = ServiceClass.STREAM
    deadline_ms: float = 1000.0
    model_version: str = "stable"

    def __post_init__(self) -> None:
        for name in ("request_id", "tenant", "task", "model_version"):
            value = getattr(self, name)
            _require(
                isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH,
                f"{name} of 1 to {MAX_ID_LENGTH} characters",
                repr(value)[: MAX_ID_LENGTH + 2],
            )
        _require(
            self.features.dtype == np.float32 and self.features.ndim == 2,
            "features float32 [R, D]",
            f"{self.features.dtype} {list(self.features.shape)}",
        )
        _check_cu_seqlens(self.cu_seqlens, self.features.shape[0])
        _require(
            bool(np.isfinite(self.deadline_ms)) and self.deadline_ms > 0,
            "deadline_ms finite and above 0",
            self.deadline_ms,
        )
        _require(
            isinstance(self.service_class, ServiceClass),
            "service_class stream, interactive or batch",
            self.service_class,
        )

    @property
    def num_sequences(self) -> int:
        """Number of sequences, B."""
        return self.cu_seqlens.size - 1


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, milliseconds inside the replica."""

    queued_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True, eq=False)
class InferResponse:
    """The answer to one ``InferRequest``, sequences in the request's order.

    Args:
        outputs: Rows of all sequences [R_out, D_out]; columns are the task's ``outputs``.
        cu_seqlens: Row offsets of the sequences in ``outputs``, int32 [B+1].
        status: ``SequenceStatus`` per sequence, uint8 [B].
        model_version: The version that computed this, never an alias.
        tokens_per_expert: This request's routed (token, choice) pairs, int64 [L, E].
    """

    request_id: str
    outputs: NDArray[Any]
    cu_seqlens: NDArray[np.int32]
    status: NDArray[np.uint8]
    model_version: str
    timings: Timings
    tokens_per_expert: NDArray[np.int64]

    def __post_init__(self) -> None:
        _check_cu_seqlens(self.cu_seqlens, self.outputs.shape[0])
        _require(
            self.status.dtype == np.uint8 and self.status.shape == (self.cu_seqlens.size - 1,),
            f"status uint8 [{self.cu_seqlens.size - 1}]",
            f"{self.status.dtype} {list(self.status.shape)}",
        )
