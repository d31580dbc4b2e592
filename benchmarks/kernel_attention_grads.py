"""Gradients of attention: whoever runs it forward, runs it backward too.

Legend: T packed positions, H heads, d head width, N checked rows, n positions of a sequence, C
some partners of a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernel_attention_inputs import AttentionInputs
from benchmarks.kernel_op import Call, spread_rows
from kernels.attention import visible

NUM_ROWS = 4
PARTNERS = 64  # whose scores are in memory together

Prepare = Callable[[AttentionInputs], Call]


def with_gradients(prepare: Prepare) -> Prepare:
    """Return the same peer; where a gradient of the output is given, it goes both ways.

    The call then returns those of queries, keys and values at the checked rows, [N, 3 * H, d].
    """

    def prepared(inputs: AttentionInputs) -> Call:
        call, grad_THd = prepare(inputs), inputs.grad
        if grad_THd is None:
            return call
        leaves, row_N = (inputs.q, inputs.k, inputs.v), checked_rows(inputs)

        def both_ways() -> Tensor:
            with torch.enable_grad():
                out_THd = call()
            grads = torch.autograd.grad(out_THd, leaves, grad_THd)
            return torch.cat([grad.index_select(0, row_N) for grad in grads], dim=1)

        return both_ways

    return prepared


def checked_rows(inputs: AttentionInputs) -> Tensor:
    """Return rows evenly apart; none is global in a long sequence: all rows depend on that."""
    return spread_rows(len(inputs.q), NUM_ROWS + 1, inputs.q.device)[1:]


def exact_gradients(inputs: AttentionInputs, grad_THd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the checked rows of what a call returns, all of them, and their values in float64.

    With P the softmax, dS = P (dO v - dO O): dq = dS k / sqrt(d); dk, dv from all who see the row.
    """
    row_N = checked_rows(inputs)
    sequence_N = torch.searchsorted(inputs.cu_seqlens, row_N, right=True) - 1
    values = []
    for row, sequence in zip(row_N.tolist(), sequence_N.tolist(), strict=True):
        start, end = inputs.cu_seqlens[sequence : sequence + 2].tolist()
        q, k, v, grad = (
            x[start:end].transpose(0, 1).double() for x in (*inputs[:3], grad_THd)
        )  # [H, n, d]
        position_n, own = torch.arange(end - start, device=q.device), row - start
        near_C = visible(position_n[own : own + 1], position_n, inputs.pattern)[0].nonzero()[:, 0]
        scale, of_query = q.shape[2] ** -0.5, torch.zeros_like(q[:, 0])
        of_key, of_value = torch.zeros_like(of_query), torch.zeros_like(of_query)
        for rows_C in near_C.split(PARTNERS):  # what sees what is symmetric
            seen_Cn = visible(rows_C, position_n, inputs.pattern)
            score_HCn = (q[:, rows_C] @ k.transpose(1, 2) * scale).masked_fill(~seen_Cn, -torch.inf)
            weight_HCn = score_HCn.softmax(dim=2)
            through_HC = (grad[:, rows_C] * (weight_HCn @ v)).sum(2)
            of_value += (weight_HCn[:, :, own, None] * grad[:, rows_C]).sum(1)
            change_HC = (grad[:, rows_C] * v[:, own, None]).sum(2) - through_HC
            of_key += ((weight_HCn[:, :, own] * change_HC)[:, :, None] * q[:, rows_C]).sum(1)
            if own in rows_C:
                (at,) = (rows_C == own).nonzero()[0].tolist()
                change_Hn = (grad[:, own, None] * v).sum(2) - through_HC[:, at, None]
                of_query = ((weight_HCn[:, at] * change_Hn)[:, :, None] * k).sum(1)
        values.append(torch.cat([of_query * scale, of_key * scale, of_value]))
    return torch.arange(len(row_N), device=row_N.device), torch.stack(values)
