"""Compile every Triton launch for sm_90 without a GPU and print what the compiler says.

The real launch functions run on meta tensors.  Triton's cache hook sees each kernel with
the very signature, alignment and tile sizes of the launch, compiles it for the H200
and cancels the launch.  One JSON line per kernel.

Not covered: values (interpreter, GPU tests), speed (benchmarks).
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JitFunctionInfo

from kernels._triton import attention, grouped_ffn, norm, permute, routing, trees
from kernels.attention import AttentionPattern
from kernels.trees import TreeEnsemble

Launch = dict[str, Any]  # signature, constants, configs, num_warps, num_stages, ...
TARGET = GPUTarget("cuda", 90, 32)


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


class Report:
    """Cache hook: compiles what would be launched, prints one line, cancels the launch."""

    shape = ""

    def __call__(self, *, fn: JitFunctionInfo, compile: Launch, **_: object) -> bool:  # noqa: A002
        source = ASTSource(
            fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0]
        )
        options = {key: compile[key] for key in ("num_warps", "num_stages")}
        kernel = triton.compile(source, target=TARGET, options=options)
        usage = resource_usage(kernel.asm["cubin"])
        line = {
            "shape": self.shape,
            "kernel": kernel.metadata.name,
            "registers": usage["REG"],
            "stack_bytes": usage["STACK"],
            "local_bytes": usage["LOCAL"],
            "shared_bytes": kernel.metadata.shared,
            "num_wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
            "num_dot": kernel.asm["ttir"].count("tt.dot"),
        }
        sys.stdout.write(json.dumps(line) + "\n")
        return True


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(shape: Shape) -> None:
    """Launch every op of a step at this shape."""
    t, d, f, e = shape[:4]
    meta = partial(empty, dtype=shape.dtype)
    x_TD = meta(t, d)
    logits_TE, bias_E = empty(t, e), empty(e)
    sizes = (shape.chosen, shape.block_rows)
    routed = routing.launch(logits_TE, bias_E, *sizes, None, shape.groups)
    routing.launch(logits_TE, bias_E, *sizes, meta(1, dtype=torch.int32), shape.groups)
    x_RD = permute.launch_permute(x_TD, routed.tokens_R)
    y_RD = grouped_ffn.launch(x_RD, meta(e, 2 * f, d), meta(e, d, f), routed)
    permute.launch_combine(y_RD, routed.weights_TK, routed.rows_TK)
    norm.launch(x_TD, x_TD, meta(d), 1e-6)
    q_THd, k_THd, v_THd = meta(t, 3, shape.heads, shape.head).unbind(1)
    cu_seqlens = meta(t // 4 + 1, dtype=torch.int32)
    for pattern in (AttentionPattern(None), AttentionPattern(1024, 64)):
        attention.launch(q_THd, k_THd, v_THd, cu_seqlens, pattern)


def launch_trees(num_trees: int, depth: int, num_features: int) -> None:
    """Launch the tree ensemble of a fraud request."""
    nodes, leaves = 2**depth - 1, 2**depth
    ensemble = TreeEnsemble(
        empty(num_trees, nodes, dtype=torch.int32),
        empty(num_trees, nodes),
        empty(num_trees, nodes, dtype=torch.bool),
        empty(num_trees, leaves),
        empty(num_trees, leaves, num_features),
        empty(),
    )
    trees.launch(empty(200, num_features), ensemble)


def main() -> None:
    report = Report()
    driver.set_active(OfflineDriver())
    knobs.runtime.jit_cache_hook = report
    for report.shape, shape in SHAPES.items():
        launch_all(shape)
    report.shape = "fraud"
    launch_trees(num_trees=200, depth=6, num_features=24)


if __name__ == "__main__":
    main()
