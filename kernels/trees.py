"""A boosted tree ensemble as arrays: logit and leaf embedding of each row.

    bytes   4 N (F + 1 + E) + 9 S (L - 1) + 4 S L (1 + E)
    FLOPs   none on matrix units: N S log2 L comparisons, N S (1 + E) additions

Each form gives the same bits each time; on a GPU few rows are summed in another order than many.

Covered: complete binary trees of equal depth, missing values.  Not covered:
categorical splits, several classes.

Legend: N rows (in ``TreeEnsemble``: inner nodes of a tree), F features, S trees,
L leaves, E embedding width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import Impl, check, select_impl


class TreeEnsemble(NamedTuple):
    """S complete binary trees of equal depth; nodes in breadth-first order.

    A row goes left where x < threshold; NaN goes left where ``missing_left`` says so.
    Thresholds lie above -inf; +inf sends every finite value left.

    Args:
        feature_SN: Feature that each inner node compares, int32; N = 2^depth - 1.
        threshold_SN: float32.
        missing_left_SN: bool.
        leaf_SL: Logit of each leaf, float32; L = 2^depth.
        leaf_embedding_SLE: Embedding of each leaf, float32.
        base: Logit before any tree, float32 scalar.
    """

    feature_SN: Tensor
    threshold_SN: Tensor
    missing_left_SN: Tensor
    leaf_SL: Tensor
    leaf_embedding_SLE: Tensor
    base: Tensor


def tree_ensemble(
    x_NF: Tensor, ensemble: TreeEnsemble, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return each row's logit and the sum of its leaves' embeddings.

        logit[n] = base + sum_s leaf[s, l(n, s)]    embedding[n] = sum_s leaf_embedding[s, l(n, s)]

    Args:
        x_NF: Features, float32, any layout; NaN = missing.
        ensemble: The trees.
        impl: Form to run.

    Returns:
        (logit [N], embedding [N, E]), float32, differentiable in the leaves, not in x.

    Raises:
        ValueError: A shape, dtype or layout disagrees with the above.

    Source:
        Chen and Guestrin 2016, eq. 1 and section 3.4 (arXiv:1603.02754).
    """
    num_trees, num_leaves = ensemble.leaf_SL.shape
    nodes = (num_trees, num_leaves - 1)
    check("x_NF", x_NF, (None, None), torch.float32, contiguous=False)
    check("feature_SN", ensemble.feature_SN, nodes, torch.int32)
    check("threshold_SN", ensemble.threshold_SN, nodes, torch.float32)
    check("missing_left_SN", ensemble.missing_left_SN, nodes, torch.bool)
    check("leaf_SL", ensemble.leaf_SL, (None, None), torch.float32)
    embedding_shape = (num_trees, num_leaves, None)
    check("leaf_embedding_SLE", ensemble.leaf_embedding_SLE, embedding_shape, torch.float32)
    if num_leaves < 2 or num_leaves & (num_leaves - 1):
        message = f"leaf_SL: expected a power of two from 2 leaves, got {num_leaves}"
        raise ValueError(message)
    form = select_impl(impl, x_NF, ensemble.leaf_SL, ensemble.leaf_embedding_SLE)
    if form == "triton":
        from kernels._triton.trees import launch  # noqa: PLC0415 - Triton is optional

        return launch(x_NF, ensemble)
    if form == "reference" or num_trees == 0:
        return tree_ensemble_reference(x_NF, ensemble)
    return _tree_ensemble_torch(x_NF, ensemble)


def tree_ensemble_reference(x_NF: Tensor, ensemble: TreeEnsemble) -> tuple[Tensor, Tensor]:
    """The formula, tree by tree, level by level."""
    logit_N = ensemble.base.expand(x_NF.shape[0])
    embedding_NE = x_NF.new_zeros(x_NF.shape[0], ensemble.leaf_embedding_SLE.shape[2])
    num_inner = ensemble.feature_SN.shape[1]
    for feature, threshold, missing_left, leaf, embedding in zip(*ensemble[:5], strict=True):
        node_N = torch.zeros(x_NF.shape[0], dtype=torch.int64, device=x_NF.device)
        for _ in range((num_inner + 1).bit_length() - 1):
            value_N = x_NF.gather(1, feature[node_N].long().unsqueeze(1)).squeeze(1)
            left_N = (value_N < threshold[node_N]) | (value_N.isnan() & missing_left[node_N])
            node_N = 2 * node_N + torch.where(left_N, 1, 2)
        logit_N = logit_N + leaf[node_N - num_inner]
        embedding_NE = embedding_NE + embedding[node_N - num_inner]
    return logit_N, embedding_NE


def _tree_ensemble_torch(x_NF: Tensor, ensemble: TreeEnsemble) -> tuple[Tensor, Tensor]:
    """All rows go down all trees at once, a level at a time; leaves are summed by bag."""
    num_trees, num_leaves = ensemble.leaf_SL.shape
    leaf_NS = _descend(x_NF, ensemble)
    leaf_NS = leaf_NS + torch.arange(num_trees, device=x_NF.device) * num_leaves
    leaf = ensemble.leaf_SL.flatten().index_select(0, leaf_NS.flatten())
    logit_N = leaf.view_as(leaf_NS).sum(dim=1) + ensemble.base
    embedding_NE = functional.embedding_bag(
        leaf_NS, ensemble.leaf_embedding_SLE.flatten(0, 1), mode="sum"
    )
    return logit_N, embedding_NE


def _descend(x_NF: Tensor, ensemble: TreeEnsemble) -> Tensor:
    """Return the leaf of each row in each tree, int64 [N, S].

    A missing value is looked up as -inf where it goes left and as +inf where it goes
    right, so one comparison decides every node.
    """
    (num_rows, num_features), (num_trees, num_inner) = x_NF.shape, ensemble.feature_SN.shape
    device = x_NF.device
    missing_NF = x_NF.isnan()
    x = torch.cat(
        [x_NF.masked_fill(missing_NF, torch.inf), x_NF.masked_fill(missing_NF, -torch.inf)], dim=1
    ).flatten()
    column = (ensemble.feature_SN + ensemble.missing_left_SN * num_features).flatten().long()
    threshold = ensemble.threshold_SN.flatten()
    row_NS = torch.arange(num_rows, device=device).unsqueeze(1) * (2 * num_features)
    row_NS = row_NS.expand(num_rows, num_trees).flatten()
    root_NS = (torch.arange(num_trees, device=device) * num_inner).repeat(num_rows)
    node_NS = root_NS  # numbered through all trees: child = 2 (node - root) + 1 or 2 + root
    for _ in range(num_inner.bit_length()):
        value_NS = x.index_select(0, row_NS + column.index_select(0, node_NS))
        left_NS = value_NS < threshold.index_select(0, node_NS)
        node_NS = torch.add(2 - root_NS, node_NS, alpha=2) - left_NS.long()
    return (node_NS - root_NS - num_inner).view(num_rows, num_trees)
