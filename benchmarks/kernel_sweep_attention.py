"""``python -m benchmarks.kernel_sweep_attention``: choose the tiles of attention, on the GPU.

For each kind of launch of ``kernels.attention_config`` the whole op is run with each candidate:
compared with exact rows, then timed inside a CUDA graph.  A candidate that fails or is wrong is
skipped and said why.  The file has the form that ``attention_config`` reads and is written after
each kind; candidates were compiled for sm_90 without spills before they came into the list.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_attention import ATTENTION
from benchmarks.kernel_block_sparse import BLOCK_SPARSE
from benchmarks.kernel_op import Op
from benchmarks.kernel_timing import Series, capture, first_line
from kernels.attention import AttentionPattern, varlen_attention
from kernels.attention_config import TileConfig, tiles, using
from kernels.block_sparse import SparsePattern, block_sparse_attention

SAMPLES = 7
COMPILERS = 12  # processes; what they compile stays in Triton's cache on disk
COMPILED_ROWS = 8192  # no number of rows is compiled in, from here on
WRONG = 0.03  # of the norm: bfloat16 leaves 0.005, a choice on the edge 0.014


class Kind(NamedTuple):
    """What is swept.

    Args:
        op: Whose calls are timed.
        model: First letters of its case,
        size: and its positions.
        pattern: What it attends to.
        candidates: Its tiles.
    """

    op: Op[Any]
    model: str
    size: int
    pattern: AttentionPattern | SparsePattern
    candidates: Sequence[TileConfig]


DENSE = (
    TileConfig(64, 64, 4, 3),
    TileConfig(64, 64, 4, 2),
    TileConfig(64, 32, 4, 3),
    TileConfig(128, 64, 8, 2),
    TileConfig(128, 64, 8, 2, 128),
    TileConfig(128, 64, 8, 3),
)
LISTED = (  # the blocks are those of the pattern; of pooled rows 64 or 128
    TileConfig(128, 64, 8, 2),
    TileConfig(128, 64, 8, 3),
    TileConfig(128, 64, 8, 4),
    TileConfig(128, 64, 8, 2, 128),
)
FAR = LISTED[:-1]
SCORES = (
    TileConfig(128, 128, 8, 2),
    TileConfig(128, 128, 8, 2, 128),
    TileConfig(128, 128, 8, 3, 128),
    TileConfig(128, 64, 8, 3),
    TileConfig(128, 64, 4, 3),
    TileConfig(128, 256, 8, 2),
)
KEY_GRADS = (  # two sums of a tile: larger ones spill
    TileConfig(128, 64, 8, 2),
    TileConfig(128, 32, 8, 2),
    TileConfig(64, 32, 4, 2),
)
QUERY_GRADS = (
    *KEY_GRADS,
    TileConfig(128, 64, 8, 3),
    TileConfig(64, 64, 4, 2),
    TileConfig(64, 64, 4, 3),
)
BACKWARD = "gradients window"
KINDS = {
    "window": Kind(ATTENTION, "window", 65536, AttentionPattern(1024, 64), DENSE),
    "scores": Kind(BLOCK_SPARSE, "dropped", 65536, SparsePattern(), SCORES),
    "sparse": Kind(BLOCK_SPARSE, "dropped", 65536, SparsePattern(), LISTED),
    "pooled": Kind(BLOCK_SPARSE, "pooled", 65536, SparsePattern(0, far="pooled"), FAR),
    "full": Kind(ATTENTION, "full", 8192, AttentionPattern(None), DENSE),
    "grad_queries": Kind(ATTENTION, BACKWARD, 65536, AttentionPattern(1024, 64), QUERY_GRADS),
    "grad_keys": Kind(ATTENTION, BACKWARD, 65536, AttentionPattern(1024, 64), KEY_GRADS),
}


def main() -> None:
    """Sweep all kinds in the time given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=90.0, help="no candidate begins after")
    parser.add_argument("--out", type=Path, required=True, help="kernels/configs/attention.json")
    args = parser.parse_args()
    ends_s = time.monotonic() + args.seconds
    _say({"compiled_s": compile_all()})
    best = dict(tiles())
    for name, kind in KINDS.items():
        timed = sweep(name, kind, ends_s)
        if timed:
            best[name] = min(timed, key=lambda config: timed[config])
            with_best = tiles() | {name: best[name]}
            tiles().update(with_best)  # what follows is measured with it
            _say({"kind": name, "best": best[name]._asdict(), "us": timed[best[name]]})
        lines = [f'  "{key}": {json.dumps(each._asdict())}' for key, each in best.items()]
        args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def compile_all() -> float:
    """Compile every candidate, many at a time; return the seconds that took."""
    began_s = time.monotonic()
    every = [(name, config) for name, kind in KINDS.items() for config in kind.candidates]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILERS, mp_context=context) as pool:
        for future in [pool.submit(_compile, *each) for each in every]:
            future.exception()  # it fails again, and is said so, when it is timed
    return round(time.monotonic() - began_s, 1)


def _compile(name: str, config: TileConfig) -> None:
    kind = KINDS[name]
    qkv = torch.zeros(3, COMPILED_ROWS, 16, 128, dtype=torch.bfloat16, device="cuda")
    qkv.requires_grad_(kind.model == BACKWARD)
    with using(name, config):
        out = _call(kind.pattern, *qkv.unbind(0))
        if out.requires_grad:
            torch.autograd.grad(out.sum(), qkv)


def _call(pattern: AttentionPattern | SparsePattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu_seqlens = torch.zeros(2, dtype=torch.int32, device=q.device)
    cu_seqlens[1:].fill_(len(q))  # no copy from the host
    if isinstance(pattern, SparsePattern):
        return block_sparse_attention(q, k, v, cu_seqlens, pattern)
    return varlen_attention(q, k, v, cu_seqlens, pattern)


@torch.no_grad()
def sweep(name: str, kind: Kind, ends_s: float) -> dict[TileConfig, float]:
    """Return the time of each candidate that is right, us."""
    (case, *_) = [
        case
        for case in kind.op.cases("cuda")
        if case.model.startswith(kind.model) and case.size == kind.size
    ]
    inputs = case.draw(torch.Generator("cuda").manual_seed(0))
    rows, exact = kind.op.exact(inputs)
    call = kind.op.peers[0].prepare(inputs)
    timed: dict[TileConfig, float] = {}
    for config in kind.candidates:
        line: dict[str, Any] = {"kind": name, **config._asdict()}
        if time.monotonic() > ends_s:
            _say({**line, "skipped": "the time was over"})
            continue
        try:
            with using(name, config):
                error = float((call()[rows].double() - exact).norm() / exact.norm())
                if error <= WRONG:
                    timed[config] = _time(call)
        except Exception as problem:  # noqa: BLE001 - a candidate's error is a line
            _say({**line, "skipped": first_line(problem)})
            continue
        _say({**line, "error": round(error, 5), "us": timed.get(config, "not timed: wrong")})
    return timed


def _time(call: Any) -> float:  # noqa: ANN401 - a call of an op
    series = Series(capture([call]).replay, 1, "cuda")
    series.warm_up()
    series.num_samples = SAMPLES
    for _ in range(SAMPLES):
        series.sample()
    return round(series.timing().us, 1)


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
