"""Does a request fit its task: the checks that need a ``TaskSpec``; numpy only.

What needs no task (shapes, offsets, ids) was checked where the request was built.

Legend: R rows, B sequences.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequestError
from cluster.schemas import InferRequest
from cluster.work import Work
from core_model.tasks import ExtraSpec, TaskSpec


def admit(request: InferRequest, tasks: Mapping[str, TaskSpec], num_layers: int) -> Work:
    """Return the pieces of a request that fits its task.

    Args:
        request: Checked where it was built.
        tasks: What the model serves.
        num_layers: Of the model; long sequences are cut by layer.

    Raises:
        InvalidRequestError: Unknown task, wrong width, missing or unknown extras, a
            sequence that is empty or too long, or no sequence at all.
    """
    if request.task not in tasks:
        raise _invalid(request, f"a task among {sorted(tasks)}", repr(request.task))
    spec = tasks[request.task]
    if request.features.shape[1] != spec.d_task:
        raise _invalid(request, f"features [R, {spec.d_task}]", list(request.features.shape))
    if set(request.extras) != set(spec.extras):
        raise _invalid(request, f"extras {sorted(spec.extras)}", sorted(request.extras))
    for name, extra in spec.extras.items():
        _check_extra(request, name, extra)
    tokens = _count_tokens(request, spec)
    if spec.pieces > 1:
        return Work.even(tokens, spec.pieces + num_layers + 1)  # the blocks layer by layer
    return Work.cut(tokens, spec.chunk_tokens, num_layers)


def _check_extra(request: InferRequest, name: str, extra: ExtraSpec) -> None:
    array = request.extras[name]
    count = request.num_sequences if extra.per == "sequence" else request.features.shape[0]
    if array.dtype != np.dtype(extra.dtype) or array.shape != (count, extra.width):
        expected = f"extras[{name!r}] {extra.dtype} [{count}, {extra.width}]"
        raise _invalid(request, expected, f"{array.dtype} {list(array.shape)}")


def _count_tokens(request: InferRequest, spec: TaskSpec) -> NDArray[np.int64]:
    rows = np.diff(request.cu_seqlens)
    if rows.size == 0 or rows.min() < 1 or rows.max() > spec.max_rows:
        came = f"{rows.size} of {rows.min(initial=0)} to {rows.max(initial=0)} rows"
        raise _invalid(request, f"sequences of 1 to {spec.max_rows} rows", came)
    tokens = spec.count_tokens(rows)
    if tokens.max() > spec.max_tokens:
        cut = (
            f"cut into chunks of {spec.chunk_tokens}" if spec.chunk_tokens else "which is never cut"
        )
        expected = f"at most {spec.max_tokens} tokens a sequence of {spec.name}, {cut}"
        raise _invalid(request, expected, tokens.max())
    return tokens


def _invalid(request: InferRequest, expected: str, came: object) -> InvalidRequestError:
    return InvalidRequestError(f"request {request.request_id}: expected {expected}, got {came}")
