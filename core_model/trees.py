"""Boosted trees as arrays: from a trainer's JSON to complete trees with leaf embeddings.

A tree of depth up to ``depth`` becomes a complete binary tree in breadth-first order;
a leaf above the last level is repeated below itself.  The embedding of a leaf holds,
per feature, the change of the expected logit along the path to it (path attribution,
Saabas 2014): the expectation of a node is the mean of its leaves weighted by their
training Hessian.  So the embeddings of a row's leaves, summed over trees, plus the
constant of the roots, are the row's logit.

Legend: S trees, N inner nodes, L leaves, F features, E answers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.trees import TreeEnsemble


def empty_ensemble(num_features: int) -> TreeEnsemble:
    """Return an ensemble of no trees: its logit is 0."""
    return TreeEnsemble(
        feature_SN=torch.zeros(0, 1, dtype=torch.int32),
        threshold_SN=torch.zeros(0, 1),
        missing_left_SN=torch.zeros(0, 1, dtype=torch.bool),
        leaf_SL=torch.zeros(0, 2),
        leaf_embedding_SLE=torch.zeros(0, 2, num_features),
        base=torch.zeros(()),
    )


def answers_of(ensemble: TreeEnsemble) -> Tensor | None:
    """Return which answer each tree has, bool [S, E]; None where embeddings say more than that."""
    answer_SE = (ensemble.leaf_embedding_SLE != 0).any(dim=1)
    embedded = embed_answers(ensemble.leaf_SL, answer_SE)
    return answer_SE if torch.equal(embedded, ensemble.leaf_embedding_SLE) else None


def embed_answers(leaf_SL: Tensor, answer_SE: Tensor) -> Tensor:
    """Return embeddings of leaves [S, L, E] that hold each leaf in the place of its tree's answer."""
    return leaf_SL.unsqueeze(-1) * answer_SE.unsqueeze(1).to(leaf_SL.dtype)


class _Tree:
    """One tree of the trainer's JSON, with the expectation of every node."""

    def __init__(self, tree: Mapping[str, Sequence[float]]) -> None:
        self.left = np.asarray(tree["left_children"], dtype=np.int64)
        self.right = np.asarray(tree["right_children"], dtype=np.int64)
        self.feature = np.asarray(tree["split_indices"], dtype=np.int32)
        self.condition = np.asarray(tree["split_conditions"], dtype=np.float32)
        self.missing_left = np.asarray(tree["default_left"], dtype=bool)
        self.hessian = np.asarray(tree["sum_hessian"], dtype=np.float64)
        self.expected = self.condition.astype(np.float64)
        for node in reversed(range(self.left.size)):  # children have higher numbers
            if self.left[node] >= 0:
                pair = [self.left[node], self.right[node]]
                self.expected[node] = np.average(self.expected[pair], weights=self.hessian[pair])

    def depth(self, node: int = 0) -> int:
        if self.left[node] < 0:
            return 0
        return 1 + max(self.depth(self.left[node]), self.depth(self.right[node]))


class _Arrays:
    """Complete-tree arrays of one ensemble while they are being filled."""

    def __init__(self, num_trees: int, depth: int, num_features: int) -> None:
        self.num_inner = 2**depth - 1
        self.feature = np.zeros((num_trees, self.num_inner), np.int32)
        self.threshold = np.full((num_trees, self.num_inner), np.inf, np.float32)
        self.missing_left = np.ones((num_trees, self.num_inner), bool)
        self.leaf = np.zeros((num_trees, 2**depth), np.float32)
        self.embedding = np.zeros((num_trees, 2**depth, num_features), np.float32)

    def fill(
        self, index: int, tree: _Tree, node: int, slot: int, path: NDArray[np.float64]
    ) -> None:
        """Write the subtree at ``node`` into position ``slot``."""
        is_leaf = tree.left[node] < 0
        if slot >= self.num_inner:
            self.leaf[index, slot - self.num_inner] = tree.condition[node]
            self.embedding[index, slot - self.num_inner] = path
            return
        if not is_leaf:
            self.feature[index, slot] = tree.feature[node]
            self.threshold[index, slot] = tree.condition[node]
            self.missing_left[index, slot] = tree.missing_left[node]
        for side, child in enumerate((tree.left[node], tree.right[node])):
            target, step = (node, path) if is_leaf else (child, path.copy())
            if not is_leaf:
                step[tree.feature[node]] += tree.expected[child] - tree.expected[node]
            self.fill(index, tree, target, 2 * slot + 1 + side, step)


def ensemble_from_xgboost(model: Mapping[str, Any], num_features: int) -> TreeEnsemble:
    """Convert the parsed JSON of an XGBoost binary classifier.

    Args:
        model: ``json.loads(booster.save_raw("json"))``.
        num_features: Width of the rows it was trained on.

    Returns:
        Complete trees; ``base`` is the logit of the trainer's base score.
    """
    learner = model["learner"]
    trees = [_Tree(tree) for tree in learner["gradient_booster"]["model"]["trees"]]
    depth = max((tree.depth() for tree in trees), default=1)
    arrays = _Arrays(len(trees), max(depth, 1), num_features)
    for index, tree in enumerate(trees):
        arrays.fill(index, tree, 0, 0, np.zeros(num_features))
    base_score = float(str(learner["learner_model_param"]["base_score"]).strip("[]"))
    return TreeEnsemble(
        feature_SN=torch.from_numpy(arrays.feature),
        threshold_SN=torch.from_numpy(arrays.threshold),
        missing_left_SN=torch.from_numpy(arrays.missing_left),
        leaf_SL=torch.from_numpy(arrays.leaf),
        leaf_embedding_SLE=torch.from_numpy(arrays.embedding),
        base=torch.tensor(np.log(base_score / (1.0 - base_score)), dtype=torch.float32),
    )
