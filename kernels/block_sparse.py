"""Attention over few blocks of keys, chosen by content, in both directions.

Queries are taken in blocks, keys in smaller ones; all of this for each head and each sequence.

1. Keys become means of spans of ``pool`` positions, rounded to their dtype (``kernels.compress``).
2. A query q scores a span p: ``q . (mean_p - mean)``, where ``mean`` is that of all keys of the
   sequence.  Softmax does not see such a shift, but a maximum over queries would.
3. A block of queries scores a block of keys by the largest score of any of its queries with any
   of its spans.  NaN counts as the lowest score.
4. It attends to: blocks of keys with a position at most ``window // 2`` from one of its own; the
   blocks that hold the first ``num_global`` positions; of the others the ``num_selected`` of
   highest score, of equal ones the earlier.
5. Softmax of ``q k^T / sqrt(d)`` over all keys of these blocks.  With ``far="pooled"`` also over
   the spans of all other blocks: mean key and mean value, weighted by how many positions it has.

Not covered: causal masks, grouped queries; global positions are seen by all, but see no more
than others.

Legend: T packed positions, P pooled rows, H heads, d head width, B sequences, n positions of
one; I blocks of queries, J blocks of keys, K keys, S spans.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kernels.compress import pool_spans
from kernels.dispatch import FLOATS, Form, Impl, check, compute_dtype, select_impl


@dataclass(frozen=True, slots=True)
class SparsePattern:
    """What a block of queries attends to.

    Args:
        num_selected: Blocks of keys chosen by content.
        window: Positions around, see above.
        num_global: The first positions, seen by all.
        far: What is done with the rest.
        query_block: Positions that choose together.
        key_block: Positions that are chosen together.
        pool: Positions of a span; divides ``key_block``.
    """

    num_selected: int = 64
    window: int = 1024
    num_global: int = 64
    far: Literal["dropped", "pooled"] = "dropped"
    query_block: int = 128
    key_block: int = 64
    pool: int = 16

    def __post_init__(self) -> None:
        if min(self.num_selected, self.window, self.num_global) < 0:
            message = f"expected num_selected, window and num_global from 0, got {self}"
            raise ValueError(message)
        if min(self.query_block, self.key_block, self.pool) < 1 or self.key_block % self.pool:
            message = f"expected key_block a multiple of pool, got {self.key_block}, {self.pool}"
            raise ValueError(message)

    @property
    def num_global_blocks(self) -> int:
        """Blocks of keys that hold the global positions."""
        return -(-self.num_global // self.key_block)

    def most_blocks(self, num_rows: int) -> int:
        """Return how many blocks of keys a block of queries attends to at most."""
        near = (self.query_block + 2 * (self.window // 2)) // self.key_block + 2
        most = near + self.num_global_blocks + self.num_selected
        return min(most, -(-num_rows // self.key_block))


def block_sparse_attention(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    cu_seqlens: Tensor,
    pattern: SparsePattern,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return the attention of each query over the keys that its block chose.

    Args:
        q_THd: Queries, float; the last axis contiguous, the others free.
        k_THd: Keys, shape and dtype of the queries.
        v_THd: Values, shape and dtype of the queries.
        cu_seqlens: Sequence offsets from 0 to T, int32 [B+1]; a sequence may be empty.
        pattern: What is attended to.
        impl: Form to run.  The choice has no gradient.

    Returns:
        [T, H, d], dtype of the queries, contiguous.  A NaN stays inside its sequence.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Cost:
        FLOPs ``2 H d T (n / pool + 2 K)``, K the keys attended to: the scores of spans, then two
        products.  For n = T = 65,536, H16 D128 and the default pattern (K = 5,312 of 65,536):
        1.1 + 2.9 TFLOP, 5.1 ms at 778 TFLOP/s; dense takes 35.2 TFLOP.  Measured on an H200,
        2026-11-28, in a CUDA graph, choice included: 8.3 ms (.61 of the roofline), dense with cuDNN
        55.8 ms; over 131,072 positions 20.7 and 232.8 ms.

    Source:
        Choice by mean keys: Lu et al. 2025 (MoBA, arXiv:2502.13189); window, chosen and pooled
        branches: Yuan et al. 2025 (NSA, arXiv:2502.11089).  Small spans for scores, larger blocks
        for loads, one softmax over all of it: ours.
    """
    check("q_THd", q_THd, (None, None, None), FLOATS, contiguous=False)
    for name, tensor in (("k_THd", k_THd), ("v_THd", v_THd)):
        check(name, tensor, q_THd.shape, q_THd.dtype, contiguous=False)
    if {q_THd.stride(2), k_THd.stride(2), v_THd.stride(2)} != {1}:
        message = f"expected stride 1 along the head, got q strides {q_THd.stride()}"
        raise ValueError(message)
    check("cu_seqlens", cu_seqlens, (None,), torch.int32)
    form = select_impl(impl, q_THd, k_THd, v_THd)
    if form == "triton":
        from kernels._triton.block_sparse import launch  # noqa: PLC0415 - Triton is optional

        return launch(q_THd, k_THd, v_THd, cu_seqlens, pattern)
    return _by_sequence(q_THd, k_THd, v_THd, cu_seqlens, pattern, form)


def _by_sequence(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    cu_seqlens: Tensor,
    pattern: SparsePattern,
    form: Form,
) -> Tensor:
    run = _attend_reference if form == "reference" else _attend_torch
    pieces = [q_THd.new_empty(0, *q_THd.shape[1:])]
    for start, end in pairwise(cu_seqlens.tolist()):
        if end > start:
            q, k, v = (x[start:end] for x in (q_THd, k_THd, v_THd))
            pieces.append(run(q, k, v, pattern))
    return torch.cat(pieces)


def seen_blocks(q_QHd: Tensor, k_nHd: Tensor, pattern: SparsePattern, *, first: int = 0) -> Tensor:
    """Return which blocks of keys each block of queries attends to, bool [H, I, J].

    Steps 1 to 4 of the definition for one sequence.

    Args:
        q_QHd: Queries from position ``first`` on, which begins a block.
        k_nHd: All keys of the sequence.
        pattern: What is attended to.
        first: Position of the first query.
    """
    n, device = len(k_nHd), q_QHd.device
    score_HIJ = block_scores(q_QHd.detach(), k_nHd.detach(), pattern)
    number_I = torch.arange(score_HIJ.shape[1], device=device).unsqueeze(1)
    block_I = first + number_I * pattern.query_block
    block_J = torch.arange(score_HIJ.shape[2], device=device) * pattern.key_block
    half, last_I = pattern.window // 2, (block_I + pattern.query_block).clamp(max=n) - 1
    near_IJ = (block_J <= last_I + half) & (block_J + pattern.key_block > block_I - half)
    forced_IJ = near_IJ | (block_J < pattern.num_global)
    order = torch.argsort(
        score_HIJ, dim=2, descending=True, stable=True
    )  # the earlier of equal ones
    is_candidate = (~forced_IJ).expand_as(score_HIJ).gather(2, order)
    chosen = is_candidate & (is_candidate.cumsum(2) <= pattern.num_selected)
    return forced_IJ | torch.zeros_like(chosen).scatter(2, order, chosen)


def block_scores(q_QHd: Tensor, k_nHd: Tensor, pattern: SparsePattern) -> Tensor:
    """Return the score of each block of keys for each block of queries, [H, I, J].

    Steps 1 to 3 of the definition for one sequence; the scores have gradients.

    Args:
        q_QHd: Queries.
        k_nHd: All keys of the sequence.
        pattern: Blocks and spans.
    """
    wide = compute_dtype(q_QHd.dtype)
    count_S, pooled_SHd = _spans(k_nHd, pattern.pool)
    mean_Hd = (count_S.view(-1, 1, 1) * pooled_SHd.to(wide)).sum(0) / len(k_nHd)
    q = q_QHd.to(wide)
    score_HQS = torch.einsum("qhd,shd->hqs", q, pooled_SHd.to(wide))
    score_HQS -= torch.einsum("qhd,hd->hq", q, mean_Hd).unsqueeze(2)
    score_HQS = torch.where(score_HQS.isnan(), -torch.inf, score_HQS)
    score_HQJ = _max_in_blocks(score_HQS, pattern.key_block // pattern.pool, dim=2)
    return _max_in_blocks(score_HQJ, pattern.query_block, dim=1)


def _max_in_blocks(x: Tensor, block: int, dim: int) -> Tensor:
    """Return the maxima of blocks along an axis; the last block may be smaller."""
    return torch.stack([part.amax(dim) for part in x.split(block, dim)], dim)


def _spans(x_nHd: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Return how many positions each span has, and its mean."""
    n = len(x_nHd)
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32, device=x_nHd.device)
    num_spans = -(-n // pool)
    pooled_SHd = pool_spans(x_nHd, cu_seqlens, pool, impl="torch")[:num_spans]
    first_S = torch.arange(num_spans, device=x_nHd.device) * pool
    return (n - first_S).clamp(max=pool), pooled_SHd


def _attend_reference(
    q_nHd: Tensor, k_nHd: Tensor, v_nHd: Tensor, pattern: SparsePattern
) -> Tensor:
    """The formula for one sequence: all scores, masked."""
    n, wide = len(q_nHd), compute_dtype(q_nHd.dtype)
    position_n = torch.arange(n, device=q_nHd.device)
    seen_HIJ = seen_blocks(q_nHd, k_nHd, pattern)
    seen_HnJ = seen_HIJ[:, position_n // pattern.query_block]
    bias_HnK = torch.zeros((), dtype=wide, device=q_nHd.device).where(
        seen_HnJ[:, :, position_n // pattern.key_block], -torch.inf
    )
    key, value = k_nHd, v_nHd
    if pattern.far == "pooled":
        count_S, pooled_k = _spans(k_nHd, pattern.pool)
        _, pooled_v = _spans(v_nHd, pattern.pool)
        block_S = torch.arange(len(count_S), device=q_nHd.device) * pattern.pool
        far_HnS = ~seen_HnJ[:, :, block_S // pattern.key_block]
        bias_HnS = count_S.to(wide).log().where(far_HnS, -torch.inf)
        key, value = torch.cat([key, pooled_k]), torch.cat([value, pooled_v])
        bias_HnK = torch.cat([bias_HnK, bias_HnS], dim=2)
    score_HnK = torch.einsum("nhd,khd->hnk", q_nHd.to(wide), key.to(wide))
    weight_HnK = (score_HnK * q_nHd.shape[2] ** -0.5 + bias_HnK).softmax(dim=2)
    return torch.einsum("hnk,khd->nhd", weight_HnK, value.to(wide)).to(q_nHd.dtype)


def _attend_torch(q_nHd: Tensor, k_nHd: Tensor, v_nHd: Tensor, pattern: SparsePattern) -> Tensor:
    """Block of queries by block of queries, over gathered keys."""
    n = len(q_nHd)
    seen_HIJ = seen_blocks(q_nHd, k_nHd, pattern)
    position_n = torch.arange(n, device=q_nHd.device)
    keys, values, bias_HIK = [k_nHd], [v_nHd], None
    if pattern.far == "pooled":
        count_S, pooled_k = _spans(k_nHd, pattern.pool)
        keys.append(pooled_k)
        values.append(_spans(v_nHd, pattern.pool)[1])
        block_S = torch.arange(len(count_S), device=q_nHd.device) * pattern.pool
        bias_HIK = (
            count_S.to(q_nHd.dtype)
            .log()
            .where(~seen_HIJ[:, :, block_S // pattern.key_block], -torch.inf)
        )
    key_HKd, value_HKd = (torch.cat(parts).transpose(0, 1) for parts in (keys, values))
    pieces = []
    for i in range(seen_HIJ.shape[1]):
        rows = slice(i * pattern.query_block, (i + 1) * pattern.query_block)
        seen_Hn = seen_HIJ[:, i, position_n // pattern.key_block]
        bias_HK = torch.zeros_like(seen_Hn, dtype=q_nHd.dtype).masked_fill(~seen_Hn, -torch.inf)
        if bias_HIK is not None:
            bias_HK = torch.cat([bias_HK, bias_HIK[:, i]], dim=1)
        pieces.append(_attend_kept(q_nHd[rows].transpose(0, 1), key_HKd, value_HKd, bias_HK))
    return torch.cat(pieces)


def _attend_kept(q_HQd: Tensor, key_HKd: Tensor, value_HKd: Tensor, bias_HK: Tensor) -> Tensor:
    """Return attention over the keys whose bias is finite, [Q, H, d]."""
    most = int((bias_HK > -torch.inf).sum(1).max())
    kept_HK = torch.sort(bias_HK > -torch.inf, dim=1, descending=True, stable=True).indices[
        :, :most
    ]
    index = kept_HK.unsqueeze(2).expand(-1, -1, q_HQd.shape[2])
    k, v = (x.gather(1, index) for x in (key_HKd, value_HKd))
    score_HQK = q_HQd @ k.transpose(1, 2) * q_HQd.shape[2] ** -0.5
    weight_HQK = (score_HQK + bias_HK.gather(1, kept_HK).unsqueeze(1)).softmax(dim=2)
    mixed_QHd: Tensor = (weight_HQK @ v).transpose(0, 1)
    return mixed_QHd
