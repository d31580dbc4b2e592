"""The feed-forward of a dense layer, or of a shared expert, for every token.

Of narrow layers the hidden rows never leave the chip: one launch.  Of wide ones the gate is
applied where gate and up are computed, so that only the hidden rows are written: two launches.
A shared expert beside routed ones is a slot of ``fused_moe``.

    bytes   2 T D w + 3 D F w, wide also 2 T F w        w bytes of a value
    FLOPs   6 T D F

Each form gives the same bits each time.

Covered: SwiGLU without bias, any number of tokens.  Not covered: quantised weights.

Legend: T tokens, D model, F hidden, G = 2 F.
"""

from torch import Tensor
from torch.nn import functional

from kernels.dispatch import FLOATS, Impl, check, compute_dtype, select_impl

NARROW = 128  # model width of which a program holds a whole row of sums


def swiglu_ffn(
    x_TD: Tensor,
    gate_up_GD: Tensor,
    down_DF: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return down (silu(gate x) * up x) of each token.

    Args:
        x_TD: Tokens, float, contiguous.
        gate_up_GD: First F rows gate, last F rows up; dtype of ``x_TD``, contiguous.
        down_DF: Dtype of ``x_TD``, contiguous.
        impl: Form to run.

    Returns:
        [T, D], dtype of ``x_TD``; products are accumulated in float32, the hidden row is
        rounded to the dtype of ``x_TD`` (not in the reference).

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Source:
        Shazeer 2020, eq. 6 (arXiv:2002.05202); the gate in the epilogue: Liger Kernel.
    """
    width, hidden = down_DF.shape
    check("x_TD", x_TD, (None, width), FLOATS)
    check("gate_up_GD", gate_up_GD, (2 * hidden, width), x_TD.dtype)
    check("down_DF", down_DF, (width, hidden), x_TD.dtype)
    form = select_impl(impl, x_TD, gate_up_GD, down_DF)
    if form == "triton":
        from kernels._triton.swiglu import launch, launch_gate_up  # noqa: PLC0415 - optional

        if fits_one_launch(x_TD):
            return launch(x_TD, gate_up_GD, down_DF)
        return functional.linear(launch_gate_up(x_TD, gate_up_GD), down_DF)
    if form == "torch":
        gate_TF, up_TF = functional.linear(x_TD, gate_up_GD).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate_TF) * up_TF, down_DF)
    return swiglu_ffn_reference(x_TD, gate_up_GD, down_DF)


def fits_one_launch(x_TD: Tensor) -> bool:
    """Tell whether sums and weights of a tile fit one program; float32 takes three products."""
    return x_TD.shape[1] <= NARROW and x_TD.element_size() == 2


def swiglu_ffn_reference(x_TD: Tensor, gate_up_GD: Tensor, down_DF: Tensor) -> Tensor:
    """The formula."""
    wide = compute_dtype(x_TD.dtype)
    gate_FD, up_FD = gate_up_GD.to(wide).chunk(2)
    wide_TD = x_TD.to(wide)
    hidden_TF = functional.silu(wide_TD @ gate_FD.T) * (wide_TD @ up_FD.T)
    out_TD: Tensor = hidden_TF @ down_DF.to(wide).T
    return out_TD.to(x_TD.dtype)
