"""The sum over a token's choices, which ends every form of ``kernels.fused_moe``.

    out[t] = sum_k w[t, k] sum_p y[rows[t, k], p]        p the parts of a row, if it has several

A launch of its own, or beside a shared expert the end of that one's last product (``swiglu``).
A choice that weighs 0, as those of idle tokens do, is not read: nobody may have written its row.

Bytes: 2 R D P in, 2 T D out.  Deterministic: every sum has one order.

Legend: T tokens, R routed rows, D model, K chosen, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.chain import begin, is_chained
from kernels.moe_config import MoELaunch
from kernels.routing import Routing

COMBINE_ELEMENTS = 2048  # of a block: 16 to a thread
MAX_COMBINE_D = 1024


@triton.jit
def choices(
    rows_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    token_B: tl.tensor,
    num_tokens: tl.tensor,
    K: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """Return the row and the weight of each choice of these tokens; 0 past the last token."""
    place_B, inside_B = token_B.to(tl.int64) * K, token_B < num_tokens
    rows, weights = (), ()
    for k in tl.static_range(K):
        row_B = tl.load(rows_ptr + place_B + k, mask=inside_B, other=0)
        rows += (row_B,)  # type: ignore[assignment]  # it grows
        weight_B = tl.load(weights_ptr + place_B + k, mask=inside_B, other=0.0)
        weights += (weight_B,)  # type: ignore[assignment]  # it grows
    return rows, weights


@triton.jit
def weighted_sum(
    y_ptr: tl.tensor,
    rows: tl.tuple,
    weights: tl.tuple,
    column_D: tl.tensor,
    D: tl.tensor,
    K: tl.constexpr,
    PARTS: tl.constexpr,  # of a row
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Return some columns of the sum over the choices, float32 [B, D]."""
    sum_BD = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        inside_BD = (weights[k] != 0.0)[:, None] & (column_D < D)[None, :]
        for part in tl.static_range(PARTS):
            offset_BD = (rows[k].to(tl.int64) * PARTS + part)[:, None] * D + column_D[None, :]
            y_BD = tl.load(y_ptr + offset_BD, mask=inside_BD, other=0.0)
            sum_BD += weights[k][:, None] * y_BD.to(tl.float32)
    return sum_BD


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    y_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    D: tl.tensor,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    token_B = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows, weights = choices(rows_ptr, weights_ptr, token_B, num_tokens, K)
    begin(CHAINED)
    sum_BD = weighted_sum(y_ptr, rows, weights, column_D, D, K, PARTS, BLOCK_B, BLOCK_D)
    inside_BD = (token_B < num_tokens)[:, None] & (column_D < D)[None, :]
    offset_BD = token_B[:, None] * D + column_D[None, :]
    tl.store(out_ptr + offset_BD, sum_BD.to(out_ptr.dtype.element_ty), mask=inside_BD)


def launch_combine(y_RPD: Tensor, routing: Routing, config: MoELaunch) -> Tensor:
    """Return each token's weighted sum of rows of parts, or of whole rows [R, D]: [T, D]."""
    return sum_choices(y_RPD, routing.weights_TK, routing.rows_TK, chained=is_chained(config))


def sum_choices(y_RPD: Tensor, weights_TK: Tensor, rows_TK: Tensor, *, chained: bool) -> Tensor:
    """Return the sum of weight * row over the choices of each token, [T, D].

    Args:
        y_RPD: Rows of parts that are summed too, or whole rows, [R, D].
        weights_TK: Weight of each choice.
        rows_TK: Row of each choice.
        chained: Launch while the last kernel ends; it must not write weights or rows.
    """
    (num_tokens, num_chosen), width = rows_TK.shape, y_RPD.shape[-1]
    out_TD = torch.empty(num_tokens, width, dtype=y_RPD.dtype, device=y_RPD.device)
    block_d = min(triton.next_power_of_2(width), MAX_COMBINE_D)
    block_b = COMBINE_ELEMENTS // block_d
    _combine_kernel[(triton.cdiv(num_tokens, block_b), triton.cdiv(width, block_d))](
        y_RPD,
        weights_TK,
        rows_TK,
        out_TD,
        num_tokens,
        width,
        K=num_chosen,
        PARTS=num_parts(y_RPD),
        CHAINED=chained,
        BLOCK_B=block_b,
        BLOCK_D=block_d,
        launch_pdl=chained,
    )
    return out_TD


def num_parts(y_RPD: Tensor) -> int:
    """Return how many parts a row has; whole rows have one."""
    return y_RPD.shape[1] if y_RPD.dim() == 3 else 1
