"""How many parameters a configuration has, in total and at work for one token.

Counted on the model itself, on the meta device, where nothing is stored.  Adapters and heads of
tasks are not counted, nor are the selection biases, which are no parameters.
"""

import argparse
import json
import sys
from typing import NamedTuple

import torch

from core_model.config import PRESETS, MoEConfig
from core_model.model import MoETransformer


class ParameterCount(NamedTuple):
    """Numbers of parameters.

    Args:
        total: All.
        active: Those that a token is multiplied with.
    """

    total: int
    active: int


def count_parameters(config: MoEConfig, vocabulary: int = 0) -> ParameterCount:
    """Count the block stack and, for a language model, the matrices at its ends.

    Args:
        config: Sizes.
        vocabulary: Words of a language model: one matrix looks them up, one scores them.  The
            first is not active: a token reads a row of it (so DeepSeek counts, in the document
            of the weights of DeepSeek-V3: 36.6 B "including 0.9B for the output Head").
    """
    with torch.device("meta"):
        model = MoETransformer(config, [])
    stack = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(layer.gate_up.numel() + layer.down.numel() for layer in model.moe_layers)
    resting = routed * (config.num_experts - config.num_chosen) // config.num_experts
    words = vocabulary * config.d_model
    return ParameterCount(total=stack + 2 * words, active=stack - resting + words)


def main(args: argparse.Namespace) -> int:
    """Run ``trimoe models size``: print one JSON object."""
    counted = count_parameters(PRESETS[args.preset], args.vocabulary)
    sys.stdout.write(json.dumps({"preset": args.preset, **counted._asdict()}) + "\n")
    return 0
