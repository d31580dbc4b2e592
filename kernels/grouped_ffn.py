"""The experts' feed-forward over rows that lie in expert order.

Covered: SwiGLU experts of equal size, any load, empty experts.  Not covered: bias,
quantised weights.

Legend: R routed rows, D model, F expert hidden, E experts, G = 2 F.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import FLOATS, Impl, check, compute_dtype, select_impl
from kernels.routing import Routing


def grouped_ffn(
    x_RD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    routing: Routing,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return each row's output of the expert that owns the row.

        y[r] = down[e] (silu(gate[e] x[r]) * up[e] x[r])        e = owner of row r

    Args:
        x_RD: Rows in expert order, float, contiguous.
        gate_up_EGD: First F rows gate, last F rows up; dtype of ``x_RD``, contiguous.
        down_EDF: Dtype of ``x_RD``, contiguous.
        routing: What ``route`` returned; ends and tiles are read.
        impl: Form to run.

    Returns:
        [R, D], dtype of ``x_RD``; products are accumulated in float32, the hidden row is
        rounded to the dtype of ``x_RD`` (not in the reference).  Rows that no expert owns are
        undefined.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Source:
        Shazeer 2020, eq. 6 (arXiv:2002.05202); Gale et al. 2022 (arXiv:2211.15841).
    """
    num_experts, width, hidden = down_EDF.shape
    check("x_RD", x_RD, (routing.tokens_R.numel(), width), FLOATS)
    check("gate_up_EGD", gate_up_EGD, (num_experts, 2 * hidden, width), x_RD.dtype)
    check("down_EDF", down_EDF, (num_experts, width, hidden), x_RD.dtype)
    check("routing.ends_E", routing.ends_E, (num_experts,), torch.int32)
    form = select_impl(impl, x_RD, gate_up_EGD, down_EDF)
    if form == "triton":
        from kernels._triton.grouped_ffn import launch  # noqa: PLC0415 - Triton is optional

        return launch(x_RD, gate_up_EGD, down_EDF, routing)
    run = grouped_ffn_reference if form == "reference" else _grouped_ffn_torch
    return run(x_RD, gate_up_EGD, down_EDF, routing.ends_E)


def grouped_ffn_reference(
    x_RD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Tensor:
    """The formula, expert by expert."""
    wide = compute_dtype(x_RD.dtype)
    loads = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    pieces = []
    for expert, rows_ND in enumerate(x_RD[: sum(loads)].to(wide).split(loads)):
        gate_FD, up_FD = gate_up_EGD[expert].to(wide).chunk(2)
        hidden_NF = functional.silu(rows_ND @ gate_FD.T) * (rows_ND @ up_FD.T)
        pieces.append(hidden_NF @ down_EDF[expert].to(wide).T)
    return torch.cat([*pieces, x_RD[sum(loads) :]]).to(x_RD.dtype)


def _grouped_ffn_torch(
    x_RD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Tensor:
    """Loop over experts; rows are slices, never gathered, and a hidden row stays in cache.

    The weights are unbound once: indexing them in the loop would make autograd fill a
    gradient of all experts for each one.
    """
    loads = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    weights = zip(gate_up_EGD.unbind(), down_EDF.unbind(), strict=True)
    pieces = []
    owned_RD = x_RD[: sum(loads)]
    for rows_ND, (gate_up_GD, down_DF) in zip(owned_RD.split(loads), weights, strict=True):
        gate_NF, up_NF = functional.linear(rows_ND, gate_up_GD).chunk(2, dim=1)
        pieces.append(functional.linear(functional.silu(gate_NF) * up_NF, down_DF))
    return torch.cat([*pieces, x_RD[sum(loads) :]])
