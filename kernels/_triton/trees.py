"""Triton form of ``kernels.trees``: rows by chunks of trees, then one deterministic sum.

Legend: B rows of a block, S trees, E embedding width, C chunks of trees.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.trees import TreeEnsemble

BLOCK_B = 32
TREES_PER_CHUNK = 16  # 100 trees fill 7 programs per block of rows


@triton.jit(do_not_specialize=["num_rows", "num_trees"])
def _tree_kernel(
    x_ptr: tl.tensor,
    feature_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    missing_left_ptr: tl.tensor,
    leaf_ptr: tl.tensor,
    embedding_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_trees: tl.tensor,
    x_stride_n: tl.tensor,
    x_stride_f: tl.tensor,
    E: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    NUM_INNER: tl.constexpr = (1 << DEPTH) - 1
    row_B = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    chunk = tl.program_id(1).to(tl.int64)
    inside_B = row_B < num_rows
    column_E = tl.arange(0, BLOCK_E)
    inside_BE = inside_B[:, None] & (column_E < E)[None, :]
    logit_B = tl.zeros((BLOCK_B,), tl.float32)
    embedding_BE = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    for tree in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, num_trees)):
        node_B = tl.zeros((BLOCK_B,), tl.int64)
        for _ in tl.static_range(DEPTH):
            slot_B = tree * NUM_INNER + node_B
            feature_B = tl.load(feature_ptr + slot_B).to(tl.int64)
            x_offset_B = row_B * x_stride_n + feature_B * x_stride_f
            value_B = tl.load(x_ptr + x_offset_B, mask=inside_B, other=0.0)
            threshold_B = tl.load(threshold_ptr + slot_B)
            missing_left_B = tl.load(missing_left_ptr + slot_B) != 0
            # NaN compares false, so it passes as not >= and fails as <
            left_B = tl.where(missing_left_B, ~(value_B >= threshold_B), value_B < threshold_B)
            node_B = 2 * node_B + tl.where(left_B, 1, 2)
        leaf_B = tree * (NUM_INNER + 1) + node_B - NUM_INNER
        logit_B += tl.load(leaf_ptr + leaf_B)
        offset_BE = leaf_B[:, None] * E + column_E[None, :]
        embedding_BE += tl.load(embedding_ptr + offset_BE, mask=inside_BE, other=0.0)
    out_B = (chunk * num_rows + row_B) * (E + 1)
    tl.store(out_ptr + out_B, logit_B, mask=inside_B)
    tl.store(out_ptr + out_B[:, None] + 1 + column_E[None, :], embedding_BE, mask=inside_BE)


def launch(x_NF: Tensor, ensemble: TreeEnsemble) -> tuple[Tensor, Tensor]:
    """Run the kernel on checked inputs and add up its chunks."""
    num_rows, (num_trees, num_leaves, width) = x_NF.shape[0], ensemble.leaf_embedding_SLE.shape
    num_chunks = triton.cdiv(num_trees, TREES_PER_CHUNK)
    partial = x_NF.new_empty(num_chunks, num_rows, width + 1)
    if partial.numel() > 0:
        _tree_kernel[(triton.cdiv(num_rows, BLOCK_B), num_chunks)](
            x_NF,
            *ensemble[:5],
            partial,
            num_rows,
            num_trees,
            *x_NF.stride(),
            E=width,
            DEPTH=num_leaves.bit_length() - 1,
            CHUNK=TREES_PER_CHUNK,
            BLOCK_B=BLOCK_B,
            BLOCK_E=triton.next_power_of_2(max(width, 1)),
        )
    summed = partial.sum(dim=0)
    return summed[:, 0] + ensemble.base, summed[:, 1:]
