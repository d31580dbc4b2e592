"""``python -m benchmarks.kernel_sweep``: choose how the products of an op are cut, on the GPU.

For each layer and number of tokens of the op both products are timed in each way of
``kernel_sweep_ops``, alone, inside a CUDA graph that goes through several sets of weights; then
the whole op with the best of them, with and without chained launches.  A way is compared with
the torch form before it is timed; one that fails is skipped and said why.

The file is in the form that ``kernels.moe_config`` reads and is written after each case.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_sweep_moe import compile_all, sweep
from benchmarks.kernel_sweep_ops import SWEPT
from kernels.moe_config import TUNED

KEY = ("num_experts", "num_chosen", "width", "hidden", "dtype", "tokens")


def main() -> None:
    """Sweep all cases in the time given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", choices=sorted(SWEPT), required=True)
    parser.add_argument("--seconds", type=float, default=150.0, help="no case begins after")
    parser.add_argument("--out", type=Path, default=TUNED, help="updated, entry by entry")
    args = parser.parse_args()
    ends_s = time.monotonic() + args.seconds
    _say({"compile": compile_all(args.op)})
    sizes = SWEPT[args.op].sizes
    cases = [(shape, size) for shape in sizes for size in sizes[shape]]
    for index, (shape, num_tokens) in enumerate(cases):
        left_s = ends_s - time.monotonic()
        if left_s <= 0:
            _say({"model": shape.name, "tokens": num_tokens, "skipped": "the time was over"})
            continue
        entry = sweep(args.op, shape, num_tokens, 2.0 * left_s / (len(cases) - index), _say)
        if entry is not None:
            _save(args.out, entry)
            _say({"model": shape.name, **entry})


def _save(path: Path, entry: dict[str, Any]) -> None:
    """Replace the entry of this case."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"entries": []}
    key = [entry[name] for name in KEY]
    others = [old for old in data["entries"] if [old[name] for name in KEY] != key]
    entries = sorted([*others, entry], key=lambda each: [str(each[name]) for name in KEY[:-1]])
    lines = ",\n".join(f"  {json.dumps(each)}" for each in entries)
    device = json.dumps(torch.cuda.get_device_name())
    path.write_text(f'{{"device": {device}, "entries": [\n{lines}\n]}}\n', encoding="utf-8")


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
