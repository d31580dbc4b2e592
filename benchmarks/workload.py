"""A task without a meaning for measuring the platform: sequences of any length, one number each.

Rows become tokens by one linear map; attention is a window with global tokens, as for any
long sequence; a sequence of more than ``CHUNK_TOKENS`` is run in chunks.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core_model.tasks import TaskSpec

if TYPE_CHECKING:
    from torch import nn

    from core_model.config import MoEConfig

NUM_COLUMNS = 32
WINDOW = 256
NUM_GLOBAL = 16
CHUNK_TOKENS = 1024  # four windows: a fifth of a chunk's queries is computed twice
MAX_TOKENS = 131_072


def _count_tokens(num_rows: NDArray[np.int32]) -> NDArray[np.int64]:
    return num_rows.astype(np.int64)


def _build_adapter(config: "MoEConfig") -> "nn.Module":
    from benchmarks.workload_model import TokenAdapter  # noqa: PLC0415 - torch

    return TokenAdapter(config)


def _build_head(config: "MoEConfig") -> "nn.Module":
    from benchmarks.workload_model import MeanHead  # noqa: PLC0415 - torch

    return MeanHead(config)


TOKENS = TaskSpec(
    name="tokens",
    d_task=NUM_COLUMNS,
    outputs=("value",),
    build_adapter=_build_adapter,
    build_head=_build_head,
    count_tokens=_count_tokens,
    max_rows=MAX_TOKENS,
    max_tokens=MAX_TOKENS,
    service_class="batch",
    deadline_ms=60_000.0,
    chunk_tokens=CHUNK_TOKENS,
)
