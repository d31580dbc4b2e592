"""The layer of experts, from tokens to tokens: gather, experts, weighted sum, shared expert.

Covered: SwiGLU experts of equal size, any load, empty experts, idle tokens, and a shared expert
of any hidden width.  Not covered: bias, quantised weights.

The shared expert gathers nothing, so its products have launches of their own; the last of them
ends with the weighted sum over the routed experts, which else is a launch too.

    launches        narrow layer        wide layer
    routed alone    experts, sum        up, down, sum
    with shared     experts, shared     shared gate and up, up, down, shared down

Legend: T tokens, R routed rows, D model, F expert hidden, E experts, K chosen, G = 2 F.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from kernels.dispatch import FLOATS, Impl, check, compute_dtype, needs_grad, select_impl
from kernels.moe_config import MoELaunch, MoESize, moe_launch
from kernels.routing import Routing
from kernels.swiglu import fits_one_launch, swiglu_ffn, swiglu_ffn_reference


class SharedExpert(NamedTuple):
    """The expert that every token has, beside the routed ones.

    Args:
        gate_up_GD: First F rows gate, last F rows up; F is its own, contiguous.
        down_DF: Contiguous.
        scale: Factor of what the routed experts give together.
    """

    gate_up_GD: Tensor
    down_DF: Tensor
    scale: float


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
    shared: SharedExpert | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return each token's weighted sum of what its chosen experts make of it.

        out[t] = sum_k w[t, k] down[e] (silu(gate[e] x[t]) * up[e] x[t])     e = expert k of t

    With a shared expert the result is shared(x[t]) + scale * out[t].

    Args:
        x_TD: Tokens, float, contiguous.
        gate_up_EGD: First F rows gate, last F rows up; dtype of ``x_TD``, contiguous.
        down_EDF: Dtype of ``x_TD``, contiguous.
        routing: What ``route`` returned; ``tile_rows`` says which tiles suit the experts.
        shared: Dtype of ``x_TD``; its expert adds to every token, idle ones too.
        impl: Form to run; on CUDA "auto" is Triton with gradients too.

    Returns:
        [T, D], dtype of ``x_TD``, differentiable in all but the order.  Products and the sum over
        choices are accumulated in float32; hidden rows and each routed expert's output (of a
        narrow layer each part of it) are rounded to the dtype of ``x_TD`` (not in the
        reference); so are both summands of a shared expert with gradients or in torch.  The same
        inputs give the same bits.

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
    given: tuple[Tensor, ...] = inputs
    if shared is not None:
        check("shared.down_DF", shared.down_DF, (width, None), x_TD.dtype)
        check(
            "shared.gate_up_GD", shared.gate_up_GD, (2 * shared.down_DF.shape[1], width), x_TD.dtype
        )
        given += shared[:2]
    form = select_impl(impl, *(tensor.detach() for tensor in given))  # it has gradients itself
    if form == "reference":
        return fused_moe_reference(x_TD, gate_up_EGD, down_EDF, routing, shared)
    if form == "torch":
        routed_TD = _fused_moe_torch(x_TD, gate_up_EGD, down_EDF, routing)
    elif needs_grad(*given):
        routed_TD = _FusedMoE.apply(*inputs, routing)  # type: ignore[no-untyped-call]
    else:
        config = moe_launch(_size(num_chosen, down_EDF), num_tokens, routing.block_rows)
        return launch(x_TD, gate_up_EGD, down_EDF, routing, config, shared)
    return routed_TD if shared is None else add_shared(x_TD, routed_TD, shared)


def add_shared(x_TD: Tensor, routed_TD: Tensor, shared: SharedExpert) -> Tensor:
    """Return shared(x) + scale * routed in torch, so differentiable."""
    shared_TD = swiglu_ffn(x_TD, shared.gate_up_GD, shared.down_DF, impl="torch")
    return torch.add(shared_TD, routed_TD, alpha=shared.scale)


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
        config = moe_launch(_size(weights_TK.shape[1], down_EDF), len(x_TD), routing.block_rows)
        return launch(x_TD, gate_up_EGD, down_EDF, routing, config)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs; the order has none."""
        from kernels._triton.fused_moe_grad import launch  # noqa: PLC0415 - Triton is optional

        x_TD, gate_up_EGD, down_EDF, weights_TK = ctx.saved_tensors  # type: ignore[attr-defined]
        routing: Routing = ctx.order._replace(weights_TK=weights_TK)  # type: ignore[attr-defined]
        return *launch(grad_TD.contiguous(), x_TD, gate_up_EGD, down_EDF, routing), None


def launch(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    routing: Routing,
    config: MoELaunch,
    shared: SharedExpert | None = None,
) -> Tensor:
    """Run the Triton form on checked inputs, cut as told.

    The shared expert's last launch multiplies before it waits.  What it reads then is complete:
    its hidden rows are of the first launch, for which all programs of the second have waited.
    """
    from kernels._triton import fused_moe, fused_moe_narrow, swiglu  # noqa: PLC0415 - optional
    from kernels._triton.chain import is_chained  # noqa: PLC0415

    is_narrow = _size(routing.rows_TK.shape[1], down_EDF).is_narrow
    form = fused_moe_narrow if is_narrow else fused_moe
    experts = (x_TD, gate_up_EGD, down_EDF, routing, config)
    out_TD: Tensor
    if shared is None or x_TD.numel() == 0:
        out_TD = form.launch(*experts)
        return out_TD
    hidden_TF, chained = None, is_chained(config)
    if not fits_one_launch(x_TD):
        hidden_TF = swiglu.launch_gate_up(x_TD, shared.gate_up_GD, chained=chained)
    choices = (routing.rows_TK, routing.weights_TK, shared.scale, chained)
    routed = swiglu.Choices(form.launch_rows(*experts), *choices)
    if hidden_TF is None:
        return swiglu.launch(x_TD, shared.gate_up_GD, shared.down_DF, routed)
    return swiglu.launch_down(hidden_TF, shared.down_DF, routed)


def _size(num_chosen: int, down_EDF: Tensor) -> MoESize:
    num_experts, width, hidden = down_EDF.shape
    return MoESize(num_experts, num_chosen, width, hidden, down_EDF.dtype)


def fused_moe_reference(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    routing: Routing,
    shared: SharedExpert | None = None,
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
    out_TD = (routing.weights_TK.to(wide).unsqueeze(-1) * y_TKD).sum(dim=1)
    if shared is not None:
        given = (x_TD, shared.gate_up_GD, shared.down_DF)
        shared_TD = swiglu_ffn_reference(*(tensor.to(wide) for tensor in given))
        out_TD = shared_TD + shared.scale * out_TD
    return out_TD.to(x_TD.dtype)


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
