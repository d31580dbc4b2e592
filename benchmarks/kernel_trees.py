"""The boosted tree ensemble: logit and leaf embedding of each row.

Legend: N rows, F features, S trees, L leaves, E embedding width.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_op import OURS, Call, Case, Op, Peer, compiled, demand_gpu, spread_rows
from benchmarks.kernel_roofline import Work, trees_work
from kernels.dispatch import Impl
from kernels.trees import TreeEnsemble, tree_ensemble

CHECKED_ROWS = 64
NUM_FEATURES = 32
SHARE_MISSING = 0.1
EMBEDDING_WIDTHS = (128, 1)  # of `base`; next to logits alone


class TreeInputs(NamedTuple):
    """Rows [N, F] and trees."""

    x: Tensor
    ensemble: TreeEnsemble


def _draw(
    num_rows: int, num_trees: int, depth: int, width: int, generator: torch.Generator
) -> TreeInputs:
    nodes, leaves, device = 2**depth - 1, 2**depth, generator.device
    normal = partial(torch.randn, generator=generator, device=device)
    uniform = partial(torch.rand, generator=generator, device=device)
    ensemble = TreeEnsemble(
        feature_SN=(uniform(num_trees, nodes) * NUM_FEATURES).to(torch.int32),
        threshold_SN=normal(num_trees, nodes),
        missing_left_SN=uniform(num_trees, nodes) < 0.5,
        leaf_SL=normal(num_trees, leaves) * num_trees**-0.5,
        leaf_embedding_SLE=normal(num_trees, leaves, width) * num_trees**-0.5,
        base=torch.zeros((), device=device),
    )
    x_NF = normal(num_rows, NUM_FEATURES)
    x_NF.masked_fill_(uniform(num_rows, NUM_FEATURES) < SHARE_MISSING, torch.nan)
    return TreeInputs(x_NF, ensemble)


def _cases(device: str) -> Sequence[Case[TreeInputs]]:
    size, trees, depth = (16, 3, 2) if device == "cpu" else (65536, 300, 4)
    return [
        Case(
            f"{trees}x{depth} E={width}",
            size,
            "-",
            torch.float32,
            partial(_draw, size, trees, depth, width),
        )
        for width in EMBEDDING_WIDTHS
    ]


def _work(inputs: TreeInputs) -> Work:
    num_rows, num_features = inputs.x.shape
    trees, leaves, width = inputs.ensemble.leaf_embedding_SLE.shape
    return trees_work(num_rows, num_features, trees, leaves.bit_length() - 1, width)


def _wide(ensemble: TreeEnsemble) -> TreeEnsemble:
    """Return the trees with leaves in float64; rows are compared as they are."""
    return ensemble._replace(
        leaf_SL=ensemble.leaf_SL.double(),
        leaf_embedding_SLE=ensemble.leaf_embedding_SLE.double(),
        base=ensemble.base.double(),
    )


def _exact(inputs: TreeInputs) -> tuple[Tensor, Tensor]:
    row_N = spread_rows(len(inputs.x), CHECKED_ROWS, inputs.x.device)
    return row_N, _descend(inputs.x[row_N], _wide(inputs.ensemble))[:, 0]


def _run(impl: Impl, inputs: TreeInputs) -> Call:
    return lambda: tree_ensemble(*inputs, impl=impl)[0]


def _descend(x_NF: Tensor, ensemble: TreeEnsemble) -> Tensor:
    """Return logit and embedding side by side: all trees at once, level by level."""
    num_trees, num_leaves = ensemble.leaf_SL.shape
    tree_S = torch.arange(num_trees, device=x_NF.device)
    node_NS = torch.zeros(len(x_NF), num_trees, dtype=torch.int64, device=x_NF.device)
    for _ in range(num_leaves.bit_length() - 1):
        value_NS = x_NF.gather(1, ensemble.feature_SN[tree_S, node_NS].long())
        is_left_NS = value_NS < ensemble.threshold_SN[tree_S, node_NS]
        is_left_NS |= value_NS.isnan() & ensemble.missing_left_SN[tree_S, node_NS]
        node_NS = 2 * node_NS + torch.where(is_left_NS, 1, 2)
    leaf_NS = node_NS - (num_leaves - 1)
    logit_N = ensemble.leaf_SL[tree_S, leaf_NS].sum(dim=1) + ensemble.base
    embedding_NE = ensemble.leaf_embedding_SLE[tree_S, leaf_NS].sum(dim=1)
    return torch.cat([logit_N.unsqueeze(1), embedding_NE], dim=1)


_descend_function = cache(lambda: compiled(_descend))


def _run_compiled(inputs: TreeInputs) -> Call:
    demand_gpu(inputs.x)
    return lambda: _descend_function()(*inputs)[:, 0]


TREES: Op[TreeInputs] = Op(
    "trees",
    _cases,
    [
        Peer(OURS, partial(_run, "auto")),
        Peer("torch eager", partial(_run, "torch")),
        Peer("torch.compile", _run_compiled, is_compiled=True),
    ],
    _work,
    _exact,
)
