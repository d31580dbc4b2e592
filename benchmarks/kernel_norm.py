"""Residual addition and root-mean-square norm.

Legend: T tokens, D model.
"""

from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_op import (
    OURS,
    AbsentError,
    Call,
    Case,
    Op,
    Peer,
    compiled,
    demand_gpu,
    spread_rows,
)
from benchmarks.kernel_roofline import Work, norm_work
from kernels.dispatch import Impl
from kernels.norm import SCALED_COLUMNS, add_rmsnorm, add_rmsnorm_fp8

CHECKED_ROWS = 256
SIZES = {4096: (16384,), 2048: (4096,), 1024: (8192,), 128: (8192,)}  # width -> tokens
EPS = 1e-6


class NormInputs(NamedTuple):
    """Branch and residual [T, D], gain [D]."""

    x: Tensor
    residual: Tensor
    weight: Tensor


def _draw(
    num_tokens: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> NormInputs:
    drawn = partial(torch.randn, generator=generator, device=generator.device, dtype=dtype)
    return NormInputs(drawn(num_tokens, width), drawn(num_tokens, width), drawn(width))


def _cases(device: str) -> Sequence[Case[NormInputs]]:
    is_cpu = device == "cpu"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    sizes = {32: (12,)} if is_cpu else SIZES
    return [
        Case(f"D={width}", size, "-", dtype, partial(_draw, size, width, dtype))
        for width in sizes
        for size in sizes[width]
    ]


def _work(inputs: NormInputs) -> Work:
    num_tokens, width = inputs.x.shape
    return norm_work(num_tokens, width, inputs.x.dtype)


def _exact(inputs: NormInputs) -> tuple[Tensor, Tensor]:
    row_N = spread_rows(len(inputs.x), CHECKED_ROWS, inputs.x.device)
    summed_ND = (inputs.x[row_N] + inputs.residual[row_N]).double()  # rounded first
    scale_N1 = (summed_ND.square().mean(dim=1, keepdim=True) + EPS).rsqrt()
    return row_N, summed_ND * scale_N1 * inputs.weight.double()


def _run(impl: Impl, inputs: NormInputs) -> Call:
    return lambda: add_rmsnorm(*inputs, EPS, impl=impl)[0]


def _run_quantised(inputs: NormInputs) -> Call:
    if inputs.x.shape[1] % SCALED_COLUMNS:
        message = f"needs a multiple of {SCALED_COLUMNS} columns"
        raise AbsentError(message)
    return lambda: add_rmsnorm_fp8(*inputs, EPS)[0]


def _plain(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> tuple[Tensor, ...]:
    summed_TD = x_TD + residual_TD
    return functional.rms_norm(summed_TD, weight_D.shape, weight_D, EPS), summed_TD


_plain_function = cache(lambda: compiled(_plain))


def _run_compiled(inputs: NormInputs) -> Call:
    demand_gpu(inputs.x)
    return lambda: _plain_function()(*inputs)[0]


def _run_liger(inputs: NormInputs) -> Call:
    liger: Any = import_module("liger_kernel.ops.fused_add_rms_norm")
    demand_gpu(inputs.x)
    return lambda: liger.LigerFusedAddRMSNormFunction.apply(*inputs, EPS)[0]


def _run_vllm(inputs: NormInputs) -> Call:
    """It writes over its inputs, so it has its own."""
    ops: Any = import_module("vllm._custom_ops")
    demand_gpu(inputs.x)
    x_TD, residual_TD = inputs.x.clone(), inputs.residual.clone()

    def call() -> Tensor:
        ops.fused_add_rms_norm(x_TD, residual_TD, inputs.weight, EPS)
        return x_TD

    return call


NORM: Op[NormInputs] = Op(
    "norm",
    _cases,
    [
        Peer(OURS, partial(_run, "auto")),
        Peer("fp8 ours", _run_quantised, does_less="writes the norm in 8 bits"),
        Peer("torch eager", partial(_run, "torch")),
        Peer("liger-kernel", _run_liger),
        Peer("vLLM fused_add_rms_norm", _run_vllm),
        Peer("torch.compile", _run_compiled, is_compiled=True),
    ],
    _work,
    _exact,
)
