"""Tokens into expert order, and experts' outputs back into token order.

Covered: any number of choices per token.  Not covered: dropped tokens.

Legend: T tokens, D model, K chosen experts, R routed rows (T * K, expert order).
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import FLOATS, Impl, check, compute_dtype, select_impl


def permute(x_TD: Tensor, tokens_R: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return the token behind each routed row: out[r] = x[tokens[r]].

    Args:
        x_TD: Tokens, float, contiguous.
        tokens_R: Token of each row, int32, each in [0, T).
        impl: Form to run.

    Returns:
        [R, D], dtype of ``x_TD``.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.
    """
    check("x_TD", x_TD, (None, None), FLOATS)
    check("tokens_R", tokens_R, (None,), torch.int32)
    if select_impl(impl, x_TD) == "triton":
        from kernels._triton.permute import launch_permute  # noqa: PLC0415 - Triton is optional

        return launch_permute(x_TD, tokens_R)
    return x_TD.index_select(0, tokens_R)


def combine(y_RD: Tensor, weights_TK: Tensor, rows_TK: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return each token's weighted sum of its experts' outputs.

        out[t] = sum_k weights[t, k] * y[rows[t, k]]        accumulated in float32

    Args:
        y_RD: Experts' outputs in expert order, float, contiguous.
        weights_TK: Gate weights, float32 (float64 beside float64 rows).
        rows_TK: Row that holds choice k of token t, int32, each in [0, R).
        impl: Form to run.

    Returns:
        [T, D], dtype of ``y_RD``.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Source:
        Shazeer et al. 2017, eq. 1 (arXiv:1701.06538).
    """
    check("y_RD", y_RD, (None, None), FLOATS)
    check("weights_TK", weights_TK, (None, None), compute_dtype(y_RD.dtype))
    check("rows_TK", rows_TK, weights_TK.shape, torch.int32)
    form = select_impl(impl, y_RD, weights_TK)
    if form == "triton":
        from kernels._triton.permute import launch_combine  # noqa: PLC0415 - Triton is optional

        return launch_combine(y_RD, weights_TK, rows_TK)
    if form == "torch":
        return _combine_torch(y_RD, weights_TK, rows_TK)
    return combine_reference(y_RD, weights_TK, rows_TK)


def combine_reference(y_RD: Tensor, weights_TK: Tensor, rows_TK: Tensor) -> Tensor:
    """The formula."""
    y_TKD = y_RD[rows_TK].to(weights_TK.dtype)
    return (weights_TK.unsqueeze(-1) * y_TKD).sum(dim=1).to(y_RD.dtype)


def _combine_torch(y_RD: Tensor, weights_TK: Tensor, rows_TK: Tensor) -> Tensor:
    """A token's choices are a bag of rows; nothing of the size of the rows is copied."""
    wide_RD = y_RD.to(weights_TK.dtype)
    out_TD = functional.embedding_bag(rows_TK, wide_RD, mode="sum", per_sample_weights=weights_TK)
    return out_TD.to(y_RD.dtype)
