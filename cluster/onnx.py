"""The fourth client: a model file on ONNX Runtime in this process, for the edge box.

The same request and response types as everywhere.  One row of a request is one sequence: the
window it describes was reduced to a row by the application.  The outputs of the file are laid
side by side, so that a response has one row per sequence.

Knows: numpy, ONNX Runtime.  Does not know: torch, ray, what the columns mean.

Legend: N rows, D columns of the task, W columns of all outputs together.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cluster.errors import (
    CheckpointError,
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
)
from cluster.schemas import InferRequest, InferResponse, SequenceStatus, Timings

INPUT_NAME = "features"
STABLE = "stable"
_FATAL_ONLY = 4  # severity of ONNX Runtime's own log: what fails is raised here


class OnnxClient:
    """Answers requests of one task with one model; may be called from several threads.

    Args:
        path: The model: one input ``features`` float32 [N, D], outputs float32 [N, ...].
        task: The task it serves.
        version: Its version, as responses name it.
        outputs: Names of the outputs, in the order their columns are laid.

    Raises:
        CheckpointError: The file is missing, is no model, or has other inputs or outputs.
    """

    def __init__(self, path: Path, *, task: str, version: str, outputs: Sequence[str]) -> None:
        self.task = task
        self.version = version
        self._outputs = tuple(outputs)
        self._session = _open(path)
        inputs = {each.name: each for each in self._session.get_inputs()}
        names = {each.name for each in self._session.get_outputs()}
        if inputs.keys() != {INPUT_NAME} or not names >= set(self._outputs):
            message = (
                f"{path.name}: expected input {INPUT_NAME} and outputs {', '.join(self._outputs)}, "
                f"got {', '.join(inputs)} and {', '.join(sorted(names))}"
            )
            raise CheckpointError(message)
        shape = inputs[INPUT_NAME].shape
        if inputs[INPUT_NAME].type != "tensor(float)" or len(shape) != 2:
            message = (
                f"{path.name}: expected {INPUT_NAME} float32 [N, D], "
                f"got {inputs[INPUT_NAME].type} {shape}"
            )
            raise CheckpointError(message)
        self.width: int | None = shape[1] if isinstance(shape[1], int) else None

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``cluster.client.Client``)."""
        return self.answer(request)

    def answer(self, request: InferRequest) -> InferResponse:
        """Answer one request, blocking: a run takes microseconds a row.

        Raises:
            InvalidRequestError: Another task, another width, or sequences of several rows.
            UnknownModelError: Neither ``stable`` nor the version that is loaded.
            DeadlineExceededError: The model took longer than the deadline.
            UnavailableError: The model itself failed.
        """
        self._check(request)
        started = time.perf_counter()
        outputs = self.run(request.features)
        took_ms = (time.perf_counter() - started) * 1e3
        if took_ms > request.deadline_ms:
            message = (
                f"request {request.request_id}: expected an answer within "
                f"{request.deadline_ms:.0f} ms, the model took {took_ms:.0f} ms"
            )
            raise DeadlineExceededError(message)
        is_finite = np.isfinite(outputs).all(axis=1)
        status = np.where(is_finite, SequenceStatus.OK, SequenceStatus.NON_FINITE)
        return InferResponse(
            request_id=request.request_id,
            outputs=outputs,
            cu_seqlens=request.cu_seqlens,
            status=status.astype(np.uint8),
            model_version=self.version,
            timings=Timings(queued_ms=0.0, compute_ms=took_ms),
            tokens_per_expert=np.zeros((0, 0), np.int64),  # nothing is routed
        )

    def run(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the outputs of rows, side by side, float32 [N, W].

        Raises:
            UnavailableError: The model failed, or gave another number of rows.
        """
        try:
            found = self._session.run(self._outputs, {INPUT_NAME: features})
        except Exception as error:  # ONNX Runtime has no common base of its errors
            message = f"model {self.version}: expected an answer, got {error!r:.200}"
            raise UnavailableError(message) from error
        num = features.shape[0]
        for name, output in zip(self._outputs, found, strict=True):
            if output.ndim < 1 or output.shape[0] != num:
                message = f"model {self.version}: expected {name} of {num} rows, got {output.shape}"
                raise UnavailableError(message)
        columns = [output.reshape(num, int(np.prod(output.shape[1:]))) for output in found]
        return np.concatenate(columns, axis=1, dtype=np.float32)

    def _check(self, request: InferRequest) -> None:
        if request.task != self.task:
            message = f"task: expected {self.task}, got {request.task}"
            raise InvalidRequestError(message)
        if request.model_version not in {STABLE, self.version}:
            message = f"model: expected {STABLE} or {self.version}, got {request.model_version}"
            raise UnknownModelError(message)
        num, width = request.features.shape
        if self.width is not None and width != self.width:
            message = f"features: expected {self.width} columns, got {width}"
            raise InvalidRequestError(message)
        if request.num_sequences != num or bool((np.diff(request.cu_seqlens) != 1).any()):
            message = f"cu_seqlens: expected one row per sequence, got {request.num_sequences} "
            raise InvalidRequestError(message + f"sequences of {num} rows")


def _open(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # of rows this small, a second thread only costs
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    options.enable_cpu_mem_arena = False  # it keeps what the largest request took
    try:
        data = path.read_bytes()
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        message = f"{path.name}: expected an ONNX model, got {error!r:.200}"
        raise CheckpointError(message) from error
