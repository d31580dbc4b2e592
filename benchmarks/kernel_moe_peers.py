"""Others who run the experts' feed-forward; optional, imported when they are prepared.

``grouped_mm`` and DeepGEMM are given our order of the rows; liger-kernel and vLLM make theirs
from the chosen experts within the call.

Legend: T tokens, D model, F expert hidden, E experts, K chosen, R routed rows, P padded rows.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_moe_inputs import MoEInputs
from benchmarks.kernel_op import AbsentError, Call, compiled, demand_gpu


def _grouped_experts(x_RD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, ends_E: Tensor) -> Tensor:
    hidden_RG: Tensor = functional.grouped_mm(x_RD, gate_up_EGD.transpose(1, 2), offs=ends_E)
    gate_RF, up_RF = hidden_RG.chunk(2, dim=1)
    y_RD: Tensor = functional.grouped_mm(
        functional.silu(gate_RF) * up_RF, down_EDF.transpose(1, 2), offs=ends_E
    )
    return y_RD


def _grouped_moe(
    x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, order: tuple[Tensor, ...]
) -> Tensor:
    tokens_R, ends_E, rows_TK, weights_TK = order
    y_RD = _grouped_experts(x_TD.index_select(0, tokens_R), gate_up_EGD, down_EDF, ends_E)
    return _combined(y_RD, rows_TK, weights_TK)


def _combined(y_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
    y_TKD = y_RD.index_select(0, rows_TK.flatten()).unflatten(0, rows_TK.shape)
    out_TD: Tensor = (weights_TK.unsqueeze(-1) * y_TKD).sum(dim=1).to(y_RD.dtype)
    return out_TD


_moe_function = cache(lambda: compiled(_grouped_moe))


def _moe_arguments(inputs: MoEInputs) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    routing = inputs.routing
    order = (routing.tokens_R, routing.ends_E, routing.rows_TK, routing.weights_TK)
    return inputs.x, inputs.gate_up, inputs.down, order


def moe_by_grouped_mm(inputs: MoEInputs) -> Call:
    """Two products of CUTLASS, SwiGLU between them, after a gather and before a weighted sum."""
    _demand_grouped_mm()
    arguments = _moe_arguments(inputs)
    return lambda: _grouped_moe(*arguments)


def moe_compiled(inputs: MoEInputs) -> Call:
    """``moe_by_grouped_mm``, compiled."""
    demand_gpu(inputs.x)
    _demand_grouped_mm()
    arguments = _moe_arguments(inputs)
    return lambda: _moe_function()(*arguments)


def _demand_grouped_mm() -> None:
    if not hasattr(functional, "grouped_mm"):
        message = "this torch has no grouped_mm"
        raise AbsentError(message)


def moe_by_liger(inputs: MoEInputs) -> Call:
    """Its forward, which also keeps the hidden rows for a backward."""
    liger: Any = import_module("liger_kernel.ops.fused_moe")
    demand_gpu(inputs.x)
    weights = (inputs.gate_up, inputs.down)
    chosen = (inputs.routing.experts_TK, inputs.routing.weights_TK)
    return lambda: liger.LigerFusedMoEFunction.apply(inputs.x, *weights, *chosen)


def moe_by_vllm(inputs: MoEInputs) -> Call:
    """Its Triton kernel, with the configuration it ships for this GPU if there is one."""
    vllm: Any = import_module("vllm.model_executor.layers.fused_moe")
    demand_gpu(inputs.x)
    weights = (inputs.gate_up, inputs.down)
    chosen = (inputs.routing.weights_TK, inputs.routing.experts_TK)
    return lambda: vllm.fused_experts(inputs.x, *weights, *chosen)


def moe_by_deep_gemm(inputs: MoEInputs) -> Call:
    """Its contiguous layout; where each row lies among the padded is found before the call."""
    deep_gemm: Any = import_module("deep_gemm")
    demand_gpu(inputs.x)
    block = deep_gemm.get_mk_alignment_for_contiguous_layout()
    routing, gate_up_EGD = inputs.routing, inputs.gate_up
    place_R, owner_P = padded_places(routing.load_E, block)
    token_P = torch.zeros_like(owner_P)
    token_P[place_R] = routing.tokens_R
    place_TK = place_R[routing.rows_TK]

    def call() -> Tensor:
        x_PD = inputs.x.index_select(0, token_P)
        hidden_PG = x_PD.new_empty(x_PD.shape[0], gate_up_EGD.shape[1])
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x_PD, gate_up_EGD, hidden_PG, owner_P)
        gate_PF, up_PF = hidden_PG.chunk(2, dim=1)
        y_PD = torch.empty_like(x_PD)
        product_PF = functional.silu(gate_PF) * up_PF
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(product_PF, inputs.down, y_PD, owner_P)
        return _combined(y_PD, place_TK, routing.weights_TK)

    return call


def padded_places(load_E: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return where each row lies once each expert's rows are padded to whole blocks.

    Returns:
        (place of each row int64 [R], expert of each padded row int32 [P]).
    """
    room_E = (load_E + block - 1) // block * block
    first_E = room_E.cumsum(0) - room_E
    start_E = load_E.cumsum(0) - load_E
    every_E = torch.arange(load_E.numel(), device=load_E.device)
    owner_R = every_E.repeat_interleave(load_E)
    row_R = torch.arange(owner_R.numel(), device=load_E.device)
    owner_P = every_E.repeat_interleave(room_E).to(torch.int32)
    return row_R - start_E[owner_R] + first_E[owner_R], owner_P
