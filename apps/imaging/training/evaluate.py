"""``trimoe imaging evaluate``: the two public protocols, beside what others would train.

Everything is chosen on training and validation parts; each test part is read once per row.
"""

import argparse
import json
import shlex
import sys

import torch

from apps.imaging.training.organ_protocol import evaluate_organs
from apps.imaging.training.parts import Parts
from apps.imaging.training.shape_protocol import evaluate_adrenal


def main(args: argparse.Namespace) -> int:
    """Run one protocol and print its figures as one JSON line."""
    torch.set_float32_matmul_precision("high")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    command = "trimoe " + shlex.join(sys.argv[1:])
    run = evaluate_organs if args.task == "organs" else evaluate_adrenal
    line = json.dumps(run(args, Parts(args.work), command, say))
    print(line)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0
