"""The layer of routed experts, from tokens to tokens: gather, experts, weighted sum.

Covered: SwiGLU experts of equal size, any load, empty experts, idle tokens.  Not covered: bias,
quantised weights.

A shared expert is no slot of this op: it has a width of its own and every token's rows in
order, so it is a plain dense product, which neither gathers nor sums over choices.

Legend: T tokens, R routed rows, D model, F expert hidden, E experts, K chosen, G = 2 F.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from kernels.dispatch import FLOATS, Impl, check, compute_dtype, needs_grad, select_impl
from kernels.moe_config import MoESize, moe_launch
from kernels.routing import Routing


def tile_rows(num_tokens: int, num_chosen: int, down_EDF: Tensor) -> int:
    """Return how many rows a tile of ``route`` should have for these experts.

    Chosen on the host from the mean load; no value of the device is read.
    """
    return moe_launch(_size(num_chosen, down_EDF), num_tokens).block_rows


def fused_moe(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    routing: Routing,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return each token's weighted sum of what its chosen experts make of it.

        out[t] = sum_k w[t, k] down[e] (silu(gate[e] x[t]) * up[e] x[t])     e = expert k of t

    Args:
        x_TD: Tokens, float, contiguous.
        gate_up_EGD: First F rows gate, last F rows up; dtype of ``x_TD``, contiguous.
        down_EDF: Dtype of ``x_TD``, contiguous.
        routing: What ``route`` returned; ``tile_rows`` says which tiles suit the experts.
        impl: Form to run; on CUDA "auto" is Triton with gradients too.

    Returns:
        [T, D], dtype of ``x_TD``, differentiable in all but the order.  Products and the sum over
        choices are accumulated in float32; the hidden row and each expert's output (of a narrow
        layer each part of it) are rounded to the dtype of ``x_TD`` (not in the reference).  A run with the same inputs gives the same bits.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Source:
        Shazeer et al. 2017, eq. 1 (arXiv:1701.06538); Shazeer 2020, eq. 6 (arXiv:2002.05202).
    """
    num_experts, width, hidden = down_EDF.shape
    num_tokens, num_chosen = routing.rows_TK.shape
    check("x_TD", x_TD, (num_tokens, width), FLOATS)
    check("gate_up_EGD", gate_up_EGD, (num_experts, 2 * hidden, width), x_TD.dtype)
    check("down_EDF", down_EDF, (num_experts, width, hidden), x_TD.dtype)
    check("routing.ends_E", routing.ends_E, (num_experts,), torch.int32)
    weights_dtypes = (torch.float32, compute_dtype(x_TD.dtype))
    check("routing.weights_TK", routing.weights_TK, (num_tokens, num_chosen), weights_dtypes)
    inputs = (x_TD, gate_up_EGD, down_EDF, routing.weights_TK)
    form = select_impl(impl, *(tensor.detach() for tensor in inputs))  # it has gradients itself
    if form == "triton":
        if needs_grad(*inputs):
            out_TD: Tensor = _FusedMoE.apply(*inputs, routing)  # type: ignore[no-untyped-call]
            return out_TD
        return _launch(x_TD, gate_up_EGD, down_EDF, routing)
    run = fused_moe_reference if form == "reference" else _fused_moe_torch
    return run(x_TD, gate_up_EGD, down_EDF, routing)


class _FusedMoE(torch.autograd.Function):
    """The Triton form with its gradients; the forward keeps its inputs alone."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_TD: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        weights_TK: Tensor,
        routing: Routing,
    ) -> Tensor:
        """Run the launches."""
        ctx.save_for_backward(x_TD, gate_up_EGD, down_EDF, weights_TK)
        routing = routing._replace(weights_TK=weights_TK)
        ctx.order = routing._replace(weights_TK=weights_TK.new_empty(0))  # type: ignore[attr-defined]
        return _launch(x_TD, gate_up_EGD, down_EDF, routing)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs; the order has none."""
        from kernels._triton.fused_moe_grad import launch  # noqa: PLC0415 - Triton is optional

        x_TD, gate_up_EGD, down_EDF, weights_TK = ctx.saved_tensors  # type: ignore[attr-defined]
        routing: Routing = ctx.order._replace(weights_TK=weights_TK)  # type: ignore[attr-defined]
        return *launch(grad_TD.contiguous(), x_TD, gate_up_EGD, down_EDF, routing), None


def _launch(x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, routing: Routing) -> Tensor:
    from kernels._triton import fused_moe, fused_moe_narrow  # noqa: PLC0415 - Triton is optional

    size = _size(routing.rows_TK.shape[1], down_EDF)
    config = moe_launch(size, len(x_TD), routing.block_rows)
    form = fused_moe_narrow if size.is_narrow else fused_moe
    out_TD: Tensor = form.launch(x_TD, gate_up_EGD, down_EDF, routing, config)
    return out_TD


def _size(num_chosen: int, down_EDF: Tensor) -> MoESize:
    num_experts, width, hidden = down_EDF.shape
    return MoESize(num_experts, num_chosen, width, hidden, down_EDF.dtype)


def fused_moe_reference(
    x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, routing: Routing
) -> Tensor:
    """The formula, expert by expert."""
    wide = compute_dtype(x_TD.dtype)
    loads = routing.load_E.tolist()
    rows_RD = x_TD[routing.tokens_R]
    pieces = []
    for expert, rows_ND in enumerate(rows_RD[: sum(loads)].to(wide).split(loads)):
        gate_FD, up_FD = gate_up_EGD[expert].to(wide).chunk(2)
        hidden_NF = functional.silu(rows_ND @ gate_FD.T) * (rows_ND @ up_FD.T)
        pieces.append(hidden_NF @ down_EDF[expert].to(wide).T)
    y_RD = torch.cat([*pieces, rows_RD[sum(loads) :].to(wide)])
    y_TKD = y_RD[routing.rows_TK]
    return (routing.weights_TK.to(wide).unsqueeze(-1) * y_TKD).sum(dim=1).to(x_TD.dtype)


def _fused_moe_torch(
    x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, routing: Routing
) -> Tensor:
    """Loop over experts between a gather and a bag of rows per token.

    Rows of an expert are a slice, and a hidden row stays in cache.  The weights are unbound once:
    indexing them in the loop would make autograd fill a gradient of all experts for each one.
    """
    rows_RD = x_TD.index_select(0, routing.tokens_R)
    loads = routing.ends_E.diff(prepend=routing.ends_E.new_zeros(1)).tolist()
    weights = zip(gate_up_EGD.unbind(), down_EDF.unbind(), strict=True)
    pieces = []
    owned_RD = rows_RD[: sum(loads)]
    for rows_ND, (gate_up_GD, down_DF) in zip(owned_RD.split(loads), weights, strict=True):
        gate_NF, up_NF = functional.linear(rows_ND, gate_up_GD).chunk(2, dim=1)
        pieces.append(functional.linear(functional.silu(gate_NF) * up_NF, down_DF))
    y_RD = torch.cat([*pieces, rows_RD[sum(loads) :]])
    weights_TK = routing.weights_TK.to(compute_dtype(x_TD.dtype))
    out_TD = functional.embedding_bag(
        routing.rows_TK, y_RD.to(weights_TK.dtype), mode="sum", per_sample_weights=weights_TK
    )
    return out_TD.to(x_TD.dtype)
