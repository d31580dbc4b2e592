"""Least time of an op: what it must move over the bandwidth, what it must multiply over the peak.

Bytes count what no implementation can avoid: inputs read once, of the weights those of the
experts that were hit, outputs written once; of the experts' feed-forward also the hidden rows,
written and read.  FLOPs are those of the matrix products.

Legend: T tokens, D model, F expert hidden, E experts, K chosen, R routed rows (T * K), M tiles,
H heads, d head width.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from benchmarks.kernel_timing import Series, is_gpu
from kernels.attention import AttentionPattern
from kernels.routing import num_tiles

COPY_BYTES = 2 << 30
GEMM_SIZE = 8192


class Ceilings(NamedTuple):
    """What a device can do at best.

    Args:
        bytes_s: Of a copy, read and written, per second.
        flops_s: Of matrix products per second, by dtype; others are bounded by bytes alone.
    """

    bytes_s: float
    flops_s: Mapping[torch.dtype, float]


H200 = Ceilings(  # measured 2026-11-23: copy, and products of 8192^3
    4.27e12, {torch.bfloat16: 778e12, torch.float16: 778e12, torch.float8_e4m3fn: 1260e12}
)


class Work(NamedTuple):
    """What a call must do.

    Args:
        num_bytes: Moved to or from memory.
        flops: Of matrix products.
        dtype: Of their operands.
    """

    num_bytes: float
    flops: float
    dtype: torch.dtype

    def least_us(self, ceilings: Ceilings) -> float:
        """Return the time below which the device cannot do it."""
        peak = ceilings.flops_s.get(self.dtype, float("inf"))
        return 1e6 * max(self.num_bytes / ceilings.bytes_s, self.flops / peak)


def ceilings_of(device: str) -> Ceilings | None:
    """Return those of the device: of an H200 as stated, of other GPUs measured; None on a CPU."""
    if not is_gpu(device):
        return None
    return H200 if "H200" in torch.cuda.get_device_name() else measure_ceilings(device)


def measure_ceilings(device: str) -> Ceilings:
    """Copy a GiB, and multiply bfloat16 matrices of 8192 x 8192."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us = Series(lambda: target.copy_(source), 1, device).measure().us
    left, right = (
        torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    product_us = Series(lambda: left @ right, 1, device).measure().us
    peak = 2 * GEMM_SIZE**3 / product_us * 1e6
    return Ceilings(COPY_BYTES / copy_us * 1e6, {torch.bfloat16: peak, torch.float16: peak})


def route_work(num_tokens: int, num_experts: int, num_chosen: int, block_rows: int) -> Work:
    """Scores and bias in; weights, experts, rows and tokens of each choice, loads and tiles out."""
    num_rows = num_tokens * num_chosen
    tiles = num_tiles(num_rows, num_experts, block_rows)
    words = num_tokens * num_experts + 4 * num_rows + 3 * num_experts + 2 * tiles
    return Work(4 * words, 0, torch.float32)


def moe_work(
    num_tokens: int, num_rows: int, num_active: int, sizes: tuple[int, int], dtype: torch.dtype
) -> Work:
    """Tokens in and out, hidden rows out and in, weights of the experts hit; sizes = D, F."""
    width, hidden = sizes
    elements = num_active * 3 * width * hidden + 2 * num_tokens * width + 2 * num_rows * hidden
    return Work(elements * dtype.itemsize, 6 * num_rows * width * hidden, dtype)


def visible_pairs(length: int, pattern: AttentionPattern) -> int:
    """Return how many pairs of query and key of a sequence see each other."""
    if pattern.window is None:
        return length**2
    num_local = max(0, length - pattern.num_global)
    reach = min(pattern.window // 2, max(0, num_local - 1))
    near = num_local + 2 * (reach * num_local - reach * (reach + 1) // 2)
    return length**2 - num_local**2 + near


def attention_work(
    lengths: Iterable[int],
    pattern: AttentionPattern,
    num_heads: int,
    width: int,
    dtype: torch.dtype,
) -> Work:
    """Queries, keys and values in, outputs out; two products for each visible pair."""
    lengths = list(lengths)
    pairs = sum(visible_pairs(length, pattern) for length in lengths)
    num_bytes = 4 * sum(lengths) * num_heads * width * dtype.itemsize
    return Work(num_bytes, 4 * num_heads * width * pairs, dtype)


def norm_work(num_rows: int, width: int, dtype: torch.dtype) -> Work:
    """Branch, residual and gain in; sum and normalised sum out."""
    return Work((4 * num_rows + 1) * width * dtype.itemsize, 0, dtype)


def trees_work(num_rows: int, num_features: int, num_trees: int, depth: int, width: int) -> Work:
    """Features and trees in; logit and embedding out."""
    nodes, leaves = 2**depth - 1, 2**depth
    trees = num_trees * (nodes * (4 + 4 + 1) + leaves * 4 * (1 + width))
    return Work(num_rows * 4 * (num_features + 1 + width) + trees, 0, torch.float32)
