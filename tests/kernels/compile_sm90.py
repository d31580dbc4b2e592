"""Compile every Triton launch for sm_90 without a GPU and print what the compiler says.

The real launch functions run on meta tensors.  Triton's cache hook sees each kernel with the
very signature, alignment and tile sizes of the launch and cancels the launch; then all kernels
are compiled for the H200, some at once.  One JSON line per kernel.

Not covered: values (interpreter, GPU tests), speed (benchmarks).
"""

import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver
from triton.runtime.jit import JitFunctionInfo

from kernels import swiglu as swiglu_op
from kernels._triton import (
    attention,
    attention_grad,
    block_sparse,
    fused_moe,
    fused_moe_fp8,
    fused_moe_grad,
    fused_moe_narrow,
    norm,
    routing,
    swiglu,
    trees,
)
from kernels.attention import AttentionPattern
from kernels.block_sparse import SparsePattern
from kernels.fused_moe_fp8 import E4M3
from kernels.moe_config import MoESize, moe_launch, rule
from kernels.routing import Routing, fits_one_launch
from kernels.trees import TreeEnsemble

Launch = dict[str, Any]  # signature, constants, configs, num_warps, num_stages, ...
TARGET = GPUTarget("cuda", 90, 32)
NUM_PROCESSORS = 132  # of an H200: the router has a program on each


class Shape(NamedTuple):
    """Sizes of one model step: tokens, model, hidden, experts, chosen, heads, head width.

    ``groups`` are those of the experts, all and chosen.
    """

    tokens: int
    model: int
    hidden: int
    experts: int
    chosen: int
    heads: int
    head: int
    block_rows: int
    dtype: torch.dtype = torch.bfloat16
    groups: tuple[int, int] = (1, 1)


SHAPES = {
    "base": Shape(800, 128, 192, 16, 2, 4, 32, 64),
    "base-float32": Shape(800, 128, 192, 16, 2, 4, 32, 64, torch.float32),
    "large": Shape(8192, 1024, 768, 64, 4, 16, 64, 64),
    "qwen3-30b-a3b": Shape(4096, 2048, 768, 128, 8, 32, 128, 128),
    "deepseek-v3": Shape(4096, 7168, 2048, 256, 8, 128, 192, 128, groups=(8, 4)),
}


class OfflineDriver:
    """The part of a Triton driver that a cancelled launch asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump reports for the one kernel of a cubin (REG, STACK, LOCAL, ...)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text.split("Function")[1])}


class Job(NamedTuple):
    """A kernel to compile: for which shape, from what, with which options."""

    shape: str
    source: ASTSource
    options: Launch


class Recorder:
    """Cache hook: notes what would be launched for the first time, and cancels the launch."""

    def __init__(self) -> None:
        self.shape = ""
        self.jobs: list[Job] = []
        self.known: set[tuple[str, str]] = set()

    def __call__(self, *, fn: JitFunctionInfo, compile: Launch, **_: object) -> bool:  # noqa: A002
        identity = (fn.module + fn.name, compile["key"])
        if identity in self.known:
            return True
        self.known.add(identity)
        form = GluonASTSource if fn.jit_function.is_gluon() else ASTSource
        source = form(
            fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0]
        )
        options = {key: compile[key] for key in ("num_warps", "num_stages")}
        options["maxnreg"] = json.loads(compile["specialization_data"])["options"].get("maxnreg")
        self.jobs.append(Job(self.shape, source, options))
        return True


RECORDER = Recorder()  # forked processes find its jobs by number


def report(number: int) -> str:
    """Compile a recorded kernel; return its line."""
    job = RECORDER.jobs[number]
    kernel = triton.compile(job.source, target=TARGET, options=job.options)
    usage = resource_usage(kernel.asm["cubin"])
    names = job.source.fn.arg_names
    sizes = {names[path[0]]: value for path, value in job.source.constants.items()}
    line = {
        "triton": triton.__version__,
        "shape": job.shape,
        "kernel": kernel.metadata.name,
        "rows": sizes.get("BLOCK_R"),
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "local_bytes": usage["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "num_wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "num_dot": len(re.findall(r"tt\.dot|warp_group_dot ", kernel.asm["ttgir"])),
    }
    return json.dumps(line)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_routing(shape: Shape) -> Routing:
    """Launch the router alone, with a tile for each program and with several; return a routing."""
    t, d, _, e = shape[:4]
    router_ED, num_valid = empty(e, d), empty(1, dtype=torch.int32)
    sizes = (empty(e), shape.chosen, shape.block_rows)
    many = (empty(4, e), *sizes[1:])  # biases of four tasks
    for num_tokens in (8, 256, 16384):
        logits_TE, x_TD = empty(num_tokens, e), empty(num_tokens, d, dtype=shape.dtype)
        owner_T = empty(num_tokens, dtype=torch.int32)
        routing.launch(logits_TE, *sizes, None, shape.groups, bias_rate=1e-3)
        if fits_one_launch(router_ED):
            routing.launch(x_TD, *many, num_valid, shape.groups, router_ED, owner_T=owner_T)
        else:
            routing.launch(logits_TE, *many, num_valid, shape.groups, owner_T=owner_T)
    routed, _ = routing.launch(empty(t, e), *sizes, None, shape.groups)
    return routed


def launch_swiglu(shape: Shape) -> None:
    """Launch a dense layer and a shared expert, of few tokens and of many."""
    t, d, f = shape[:3]
    meta = partial(empty, dtype=shape.dtype)
    for num_tokens in (64, t):
        x_TD, gate_up_GD, down_DF = meta(num_tokens, d), meta(2 * f, d), meta(d, f)
        num_rows, weights_TK = num_tokens * shape.chosen, empty(num_tokens, shape.chosen)
        rows = (weights_TK.int(), weights_TK, 1.0, True)
        routed = swiglu.Choices(meta(num_rows, d), *rows)
        if swiglu_op.fits_one_launch(x_TD):
            parts = swiglu.Choices(meta(num_rows, triton.cdiv(f, fused_moe_narrow.PART), d), *rows)
            for added in (None, routed, parts):
                swiglu.launch(x_TD, gate_up_GD, down_DF, added)
        else:
            swiglu.launch_gate_up(x_TD, gate_up_GD)
            hidden_TF = swiglu.launch_gate_up(x_TD, gate_up_GD, chained=True)
            swiglu.launch_down(hidden_TF, down_DF, routed)


def launch_moe(shape: Shape, routed: Routing) -> None:
    """Launch the experts with tiles of every size, as the rule and as the data cut them."""
    t, d, f, e = shape[:4]
    meta = partial(empty, dtype=shape.dtype)
    experts, size = (meta(e, 2 * f, d), meta(e, d, f)), MoESize(e, shape.chosen, d, f, shape.dtype)
    tuned = [moe_launch(size, num_tokens) for num_tokens in (16, 256, t)]
    for config in {*tuned, *(rule(size, t, rows) for rows in (16, 32, 64, 128))}:
        routing_ = routed._replace(block_rows=config.block_rows)
        fused_moe.launch(meta(t, d), *experts, routing_, config)
        if size.is_narrow:
            fused_moe_narrow.launch(meta(t, d), *experts, routing_, replace(config, chained=True))
    halves = rule(size, t, 128)
    halves = replace(halves, up=replace(halves.up, halves=True))
    fused_moe.launch_up(meta(t, d), experts[0], routed._replace(block_rows=128), halves)


def launch_moe_fp8(shape: Shape, routed: Routing) -> None:
    """Launch the experts in 8 bits with tiles of every size."""
    t, d, f, e = shape[:4]
    meta = partial(empty, dtype=E4M3)
    x = (meta(t, d), empty(t, d // 128))
    up = (meta(e, 2 * f, d), empty(e, 2 * f // 128, d // 128))
    down = (meta(e, d, f), empty(e, d // 128, f // 128))
    size = MoESize(e, shape.chosen, d, f, E4M3)
    tuned = [moe_launch(size, num_tokens) for num_tokens in (64, 256, 16384)]
    for config in {*tuned, *(rule(size, t, rows) for rows in (16, 32, 64, 128))}:
        routing_ = routed._replace(block_rows=config.block_rows)
        fused_moe_fp8.launch(x, up, down, routing_, config, torch.bfloat16)


def launch_moe_grad(shape: Shape, routed: Routing) -> None:
    """Launch the gradients of the experts, with tiles of training."""
    t, d, f, e = shape[:4]
    meta = partial(empty, dtype=shape.dtype)
    for rows in (64, 128 if shape.dtype == torch.bfloat16 else 64):
        routing_ = routed._replace(block_rows=rows)
        fused_moe_grad.launch(meta(t, d), meta(t, d), meta(e, 2 * f, d), meta(e, d, f), routing_)


def launch_all(shape: Shape) -> None:
    """Launch every op of a step at this shape."""
    t, d, f = shape[:3]
    meta = partial(empty, dtype=shape.dtype)
    x_TD = meta(t, d)
    routed = launch_routing(shape)
    launch_moe(shape, routed)
    launch_moe_grad(shape, routed)
    if f % 128 == 0 and shape.dtype == torch.bfloat16:
        launch_moe_fp8(shape, routed)
    for is_quantised in (False, True):
        norm.launch(x_TD, x_TD, meta(d), 1e-6, is_quantised=is_quantised)
    launch_swiglu(shape)
    q_THd, k_THd, v_THd = meta(t, 3, shape.heads, shape.head).unbind(1)
    cu_seqlens = meta(t // 4 + 1, dtype=torch.int32)
    for pattern in (AttentionPattern(None), AttentionPattern(1024, 64)):
        attention.launch(q_THd, k_THd, v_THd, cu_seqlens, pattern)


def launch_long_attention() -> None:
    """Launch attention over one long sequence, and over several."""
    for num_sequences, width in itertools.product((1, 8), (64, 128)):
        q_THd, k_THd, v_THd = empty(65536, 3, 16, width, dtype=torch.bfloat16).unbind(1)
        cu_seqlens = empty(num_sequences + 1, dtype=torch.int32)
        for pattern in (AttentionPattern(None), AttentionPattern(1024, 64)):
            attention.launch(q_THd, k_THd, v_THd, cu_seqlens, pattern)
            lse_HT, out_THd = empty(16, 65536), torch.empty_like(q_THd)
            qkv = (q_THd, k_THd, v_THd)
            attention_grad.launch_grads(qkv, out_THd, lse_HT, out_THd, cu_seqlens, pattern)
        for sparse in (SparsePattern(), SparsePattern(num_selected=0, far="pooled")):
            block_sparse.launch(q_THd, k_THd, v_THd, cu_seqlens, sparse)


def launch_trees(num_rows: int, num_trees: int, depth: int, num_features: int, width: int) -> None:
    """Launch a tree ensemble."""
    nodes, leaves = 2**depth - 1, 2**depth
    ensemble = TreeEnsemble(
        empty(num_trees, nodes, dtype=torch.int32),
        empty(num_trees, nodes),
        empty(num_trees, nodes, dtype=torch.bool),
        empty(num_trees, leaves),
        empty(num_trees, leaves, width),
        empty(),
    )
    trees.launch(empty(num_rows, num_features), ensemble)


def main() -> None:
    driver.set_active(OfflineDriver())
    knobs.runtime.jit_cache_hook = RECORDER
    vars(routing)["num_processors"] = lambda _: NUM_PROCESSORS
    for RECORDER.shape, shape in SHAPES.items():
        launch_all(shape)
    RECORDER.shape = "long"
    launch_long_attention()
    RECORDER.shape = "fraud"
    launch_trees(num_rows=200, num_trees=200, depth=6, num_features=24, width=24)
    for RECORDER.shape, width in (("trees", 128), ("trees-alone", 1)):
        launch_trees(num_rows=65536, num_trees=300, depth=4, num_features=32, width=width)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for line in pool.imap_unordered(report, range(len(RECORDER.jobs))):
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
