"""Others who run attention; optional, imported when they are prepared.

Legend: T packed positions, H heads, d head width, B sequences, G ones of equal length n.
"""

from functools import cache
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.kernel_attention_inputs import AttentionInputs
from benchmarks.kernel_op import AbsentError, Call, compiled, demand_gpu
from kernels.attention import AttentionPattern

FA3_WINDOW = "FlashAttention-3 window"
FA3_LIBRARY = "_vllm_fa3_C"
FA3_PLAIN = {  # arguments without a default; the others may be absent
    "is_causal": False,
    "softcap": 0.0,
    "is_rotary_interleaved": True,
    "num_splits": 0,
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}


def by_flash(inputs: AttentionInputs) -> Call:
    """FlashAttention-2 in torch."""
    return _by_sdpa(inputs, SDPBackend.FLASH_ATTENTION)


def by_cudnn(inputs: AttentionInputs) -> Call:
    """NVIDIA's own in torch."""
    return _by_sdpa(inputs, SDPBackend.CUDNN_ATTENTION)


def _by_sdpa(inputs: AttentionInputs, backend: SDPBackend) -> Call:
    demand_gpu(inputs.q)
    _demand_no_window(inputs)
    if len(set(inputs.lengths)) > 1:
        message = "takes sequences of equal length"
        raise AbsentError(message)
    n = inputs.lengths[0]

    def call() -> Tensor:
        qkv = (inputs.q, inputs.k, inputs.v)
        qkv_GHnd = [x.unflatten(0, (-1, n)).transpose(1, 2) for x in qkv]
        with sdpa_kernel(backend):
            out_GHnd = functional.scaled_dot_product_attention(*qkv_GHnd)
        return out_GHnd.transpose(1, 2).reshape(inputs.q.shape)

    return call


def _demand_no_window(inputs: AttentionInputs) -> None:
    if inputs.pattern.window is not None:
        message = "has no window"
        raise AbsentError(message)


def by_fa3(inputs: AttentionInputs) -> Call:
    """Full attention, lengths free."""
    demand_gpu(inputs.q)
    _demand_no_window(inputs)
    return _by_fa3(inputs, reach=-1)


def by_fa3_window(inputs: AttentionInputs) -> Call:
    """The window without global positions, which it does not have."""
    demand_gpu(inputs.q)
    if inputs.pattern.window is None:
        message = "the pattern has no window"
        raise AbsentError(message)
    return _by_fa3(inputs, inputs.pattern.window // 2)


def _by_fa3(inputs: AttentionInputs, reach: int) -> Call:
    if inputs.grad is not None:
        message = "this build has no gradients"
        raise AbsentError(message)
    forward, longest = _fa3_forward(), max(inputs.lengths)
    given = {
        **FA3_PLAIN,
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "cu_seqlens_q": inputs.cu_seqlens,
        "cu_seqlens_k": inputs.cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": inputs.q.shape[2] ** -0.5,
        "window_size_left": reach,
        "window_size_right": reach,
    }
    arguments = [given.get(each.name) for each in forward._schema.arguments]
    return lambda: cast("Tensor", forward(*arguments)[0])


@cache
def _fa3_forward() -> OpOverload:
    """Return FlashAttention-3's op from vLLM's build, the bare library on the path."""
    found = find_spec(FA3_LIBRARY)
    if found is None or found.origin is None:
        message = f"{FA3_LIBRARY}.abi3.so is not on the path"
        raise AbsentError(message)
    torch.ops.load_library(found.origin)
    forward: OpOverload = getattr(torch.ops, FA3_LIBRARY).fwd.default
    return forward


def _flex(q_1HTd: Tensor, k_1HTd: Tensor, v_1HTd: Tensor, mask: BlockMask) -> Tensor:
    return cast("Tensor", flex_attention(q_1HTd, k_1HTd, v_1HTd, block_mask=mask))


_flex_function = cache(lambda: compiled(_flex))


def by_flex(inputs: AttentionInputs) -> Call:
    """The pattern as a mask that the compiler fuses; its map of blocks is made before the call."""
    demand_gpu(inputs.q)
    mask = flex_mask(inputs.lengths, inputs.pattern, inputs.q.device)

    def call() -> Tensor:
        qkv_1HTd = [x.transpose(0, 1).unsqueeze(0) for x in (inputs.q, inputs.k, inputs.v)]
        out_1HTd = _flex_function()(*qkv_1HTd, mask)
        return out_1HTd[0].transpose(0, 1).contiguous()

    return call


@cache  # one for all sets of inputs, since another function is compiled anew
def flex_mask(
    lengths: tuple[int, ...], pattern: AttentionPattern, device: torch.device
) -> BlockMask:
    """Return the map of blocks of sequences that lie one after the other."""
    size, num_global = sum(lengths), pattern.num_global
    reach = size if pattern.window is None else pattern.window // 2

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        near = (query - key).abs() <= reach
        return near | (query < num_global) | (key < num_global)

    length_B = torch.tensor(lengths, device=device)
    sequence_T = torch.arange(len(lengths), device=device).repeat_interleave(length_B)
    start_T = (length_B.cumsum(0) - length_B)[sequence_T]

    def sees_own(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start = start_T[query]
        is_own = sequence_T[query] == sequence_T[key]
        return is_own & sees(batch, head, query - start, key - start)

    mask = sees if len(lengths) == 1 else sees_own
    is_gpu = device.type == "cuda"  # there it must be fused: 64K x 64K positions fill the memory
    return create_block_mask(mask, None, None, size, size, device=device, _compile=is_gpu)
