"""Triton form of ``kernels.trees``: a block of rows meets the trees one after the other.

All rows of a block are in the same tree, so its nodes and its leaves' embeddings (8 KiB at 16
leaves of 128) come from the first-level cache, and of many rows neighbours' values of a feature
lie side by side.  Few rows are spread over the device by chunks of trees, which are then summed.

Legend: B rows of a block, S trees, E embedding width, C chunks of trees.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.trees import TreeEnsemble

BLOCK_B = 128  # one row a thread
FEW_B = 32  # where that fills more of the device
CHUNK = 16  # trees of few rows: 100 of them fill 7 programs per block
MANY_ROWS = 32768  # from which blocks alone fill the device
THREAD_SUMS = 64  # embedding values that a thread adds up, beside the walk


@triton.jit
def _walk(
    x_ptr: tl.tensor,
    feature_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    missing_left_ptr: tl.tensor,
    tree: tl.tensor,
    inside_B: tl.tensor,
    x_stride_f: tl.tensor,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """The leaf of each row in one tree."""
    NUM_INNER: tl.constexpr = (1 << DEPTH) - 1
    node_B = tl.zeros(inside_B.shape, tl.int32)
    for _ in tl.static_range(DEPTH):
        slot_B = tree * NUM_INNER + node_B
        feature_B = tl.load(feature_ptr + slot_B)
        threshold_B = tl.load(threshold_ptr + slot_B)
        missing_left_B = tl.load(missing_left_ptr + slot_B) != 0
        value_B = tl.load(x_ptr + feature_B.to(tl.int64) * x_stride_f, mask=inside_B, other=0.0)
        # NaN compares false, so it passes as not >= and fails as <
        left_B = tl.where(missing_left_B, ~(value_B >= threshold_B), value_B < threshold_B)
        node_B = 2 * node_B + tl.where(left_B, 1, 2)
    return node_B - NUM_INNER


@triton.jit(do_not_specialize=["num_rows", "num_trees", "chunk", "x_stride_f"])
def _tree_kernel(
    x_ptr: tl.tensor,
    feature_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    missing_left_ptr: tl.tensor,
    leaf_ptr: tl.tensor,
    embedding_ptr: tl.tensor,
    base_ptr: tl.tensor,
    logit_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_trees: tl.tensor,
    chunk: tl.tensor,  # trees of a program
    x_stride_n: tl.tensor,
    x_stride_f: tl.tensor,
    E: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    row_B = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = tl.program_id(1) * chunk
    inside_B = row_B < num_rows
    column_E = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside_BE = inside_B[:, None] & (column_E < E)[None, :]
    base = tl.where(first == 0, tl.load(base_ptr), 0.0)
    logit_B = tl.zeros((BLOCK_B,), tl.float32) + base
    sum_BE = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    x_ptr += row_B * x_stride_n
    for tree in range(first, tl.minimum(first + chunk, num_trees)):
        leaf_B = _walk(
            x_ptr,
            feature_ptr,
            threshold_ptr,
            missing_left_ptr,
            tree,
            inside_B,
            x_stride_f,
            DEPTH,
        )
        leaf_B += tree * (1 << DEPTH)
        logit_B += tl.load(leaf_ptr + leaf_B)
        offset_BE = leaf_B.to(tl.int64)[:, None] * E + column_E[None, :]
        sum_BE += tl.load(embedding_ptr + offset_BE, mask=inside_BE, other=0.0)
    out_B = tl.program_id(1).to(tl.int64) * num_rows + row_B
    if tl.program_id(2) == 0:
        tl.store(logit_ptr + out_B, logit_B, mask=inside_B)
    tl.store(sum_ptr + out_B[:, None] * E + column_E[None, :], sum_BE, mask=inside_BE)


def launch(x_NF: Tensor, ensemble: TreeEnsemble) -> tuple[Tensor, Tensor]:
    """Run the kernel on checked inputs and add up its chunks if there are several."""
    num_rows, (num_trees, num_leaves, width) = x_NF.shape[0], ensemble.leaf_embedding_SLE.shape
    has_many = num_rows >= MANY_ROWS
    chunk = max(1, num_trees) if has_many else CHUNK
    block_b = BLOCK_B if has_many else FEW_B
    num_chunks = max(1, triton.cdiv(num_trees, chunk))
    logit_CN = x_NF.new_empty(num_chunks, num_rows)
    sum_CNE = x_NF.new_empty(num_chunks, num_rows, width)
    if num_rows == 0:
        return logit_CN[0], sum_CNE[0]
    if has_many and x_NF.stride(0) != 1:
        x_NF = x_NF.T.contiguous().T
    num_warps = 4
    most_e = max(1, THREAD_SUMS * 32 * num_warps // block_b)
    block_e = min(triton.next_power_of_2(max(width, 1)), most_e)
    grid = (triton.cdiv(num_rows, block_b), num_chunks, max(1, triton.cdiv(width, block_e)))
    _tree_kernel[grid](
        x_NF,
        *ensemble,
        logit_CN,
        sum_CNE,
        num_rows,
        num_trees,
        chunk,
        *x_NF.stride(),
        E=width,
        DEPTH=num_leaves.bit_length() - 1,
        BLOCK_B=block_b,
        BLOCK_E=block_e,
        num_warps=num_warps,
    )
    if num_chunks == 1:
        return logit_CN[0], sum_CNE[0]
    return torch.sum(logit_CN, dim=0), torch.sum(sum_CNE, dim=0)
