"""``trimoe bench model --layer``: one layer with routed experts, against the roofline of the device.

    FLOPs   2 * T * (K * 3 D F + 3 D F_shared + D E)
    bytes   router, shared expert and the experts that the tokens chose, read once; tokens in and out

The least time is the larger of FLOPs over the peak and bytes over the bandwidth.

Legend: T tokens, D model, E experts, K chosen ones, F hidden width of an expert.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.results import RESULTS, append_row
from core_model.config import PRESETS, MoEConfig
from core_model.moe import MoELayer

TOKENS = (16, 64, 256, 1024, 4096, 16384)
PEAK_FLOPS, BANDWIDTH = 778e12, 4.27e12  # measured on an H200: bf16, bytes/s
REPEATS, ROUNDS = 10, 7


def run_layer(args: argparse.Namespace) -> int:
    """Time the layer at several numbers of tokens; append a row for each.

    The least time is stated on CUDA alone: the peaks are those of an H200.
    """
    config = PRESETS[args.preset]
    is_cuda = args.device == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    with torch.device(args.device):
        torch.manual_seed(0)
        layer = MoELayer(config).eval()
    for name, parameter in layer.named_parameters():
        if name != "router":  # as ``MoETransformer.narrow_blocks``
            parameter.data = parameter.data.to(dtype)
    row: dict[str, object] = {}
    sys.stdout.write("  tokens  experts       us  least us  fraction\n")
    for num in TOKENS if is_cuda else TOKENS[:3]:
        x_TD = torch.randn(num, config.d_model, device=args.device, dtype=dtype)
        with torch.inference_mode():
            used = int(layer(x_TD)[1].unique().numel())
            seconds = (_in_graph if is_cuda else _eager)(lambda: layer(x_TD)[0])  # noqa: B023 - at once
        row = {"device": args.device, "preset": args.preset, "tokens": num, "experts": used}
        row |= {"us": round(seconds * 1e6, 1)}
        text = f"{num:8d} {used:8d} {seconds * 1e6:8.1f}"
        if is_cuda:
            least = least_seconds(config, num, used)
            row |= {"least_us": round(least * 1e6, 1), "fraction": round(least / seconds, 3)}
            text += f" {least * 1e6:9.1f} {least / seconds:9.2f}"
        sys.stdout.write(text + "\n")
        append_row(args.results or RESULTS, "model_layer", row)
    sys.stdout.write(json.dumps(row) + "\n")
    if args.json:
        args.json.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    return 0


def least_seconds(config: MoEConfig, num_tokens: int, num_used: int) -> float:
    """Return the time below which an H200 cannot run the layer.

    Args:
        config: Sizes.
        num_tokens: T.
        num_used: Experts that any token chose.
    """
    d, e = config.d_model, config.num_experts
    own, shared = 3 * d * config.d_expert, 3 * d * config.d_shared
    flops = 2 * num_tokens * (config.num_chosen * own + shared + d * e)
    read = 2 * (num_used * own + shared + d * e + 2 * num_tokens * d)
    return max(flops / PEAK_FLOPS, read / BANDWIDTH)


def _eager(run: Callable[[], Tensor]) -> float:
    run()
    times: list[float] = []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        for _ in range(REPEATS):
            run()
        times.append((time.perf_counter() - began_s) / REPEATS)
    return median(times)


def _in_graph(run: Callable[[], Tensor]) -> float:
    """Return the seconds of one run inside a captured graph of several."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    times: list[float] = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / REPEATS / 1e3)
    return median(times)
