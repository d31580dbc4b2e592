"""FlexAttention over the blocks that were chosen: the choice is made before the call.

Legend: H heads, I blocks of queries, J blocks of keys, T positions, d head width.
"""

from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.kernel_attention_inputs import AttentionInputs
from benchmarks.kernel_op import AbsentError, Call, compiled, demand_gpu
from kernels.block_sparse import SparsePattern, seen_blocks


def _flex(q_1HTd: Tensor, k_1HTd: Tensor, v_1HTd: Tensor, mask: BlockMask) -> Tensor:
    return cast("Tensor", flex_attention(q_1HTd, k_1HTd, v_1HTd, block_mask=mask))


_flex_function = cache(lambda: compiled(_flex))


def by_flex_blocks(inputs: AttentionInputs, pattern: SparsePattern) -> Call:
    """The chosen blocks as a map that the compiler fuses."""
    demand_gpu(inputs.q)
    if pattern.far == "pooled":
        message = "has no pooled keys"
        raise AbsentError(message)
    mask = block_map(inputs.q, inputs.k, pattern)
    qkv_1HTd = [x.transpose(0, 1).unsqueeze(0) for x in (inputs.q, inputs.k, inputs.v)]

    def call() -> Tensor:
        out_1HTd = _flex_function()(*qkv_1HTd, mask)
        return out_1HTd[0].transpose(0, 1).contiguous()

    return call


def block_map(q_THd: Tensor, k_THd: Tensor, pattern: SparsePattern) -> BlockMask:
    """Return the chosen blocks of one sequence, all of them seen whole."""
    seen = [
        seen_blocks(part_QHd, k_THd, pattern, first=i * pattern.query_block)
        for i, part_QHd in enumerate(q_THd.split(pattern.query_block))
    ]
    seen_HIJ = torch.cat(seen, dim=1).to(torch.int32)
    order_HIJ = torch.argsort(seen_HIJ, dim=2, descending=True, stable=True).to(torch.int32)
    counts_1HI, order_1HIJ = seen_HIJ.sum(2, dtype=torch.int32)[None], order_HIJ[None]
    mask: BlockMask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts_1HI),
        order_1HIJ,
        counts_1HI,
        order_1HIJ,
        BLOCK_SIZE=(pattern.query_block, pattern.key_block),
    )
    return mask
