"""Trees as the ``TreeEnsemble`` operator of ONNX (ai.onnx.ml 5), which ONNX Runtime has in C++.

Complete trees repeat a leaf below the place where a real tree ends; here such places end again.

Legend: S trees, N inner nodes, L leaves, E answers.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from kernels.trees import TreeEnsemble

DOMAIN, OPSET = "ai.onnx.ml", 5
_LESS_THAN = 1  # of the operator's modes: goes to the true side where x < split
_SUM = 1  # of its aggregate functions


@dataclass(slots=True)
class _Arrays:
    """The operator's attributes while they grow; by node, then by leaf."""

    feature: list[int] = field(default_factory=list)
    split: list[float] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    child: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    is_leaf: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    weight: list[float] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)


class _Tree:
    """One complete tree."""

    def __init__(self, arrays: _Arrays, trees: TreeEnsemble, idx: int) -> None:
        self.arrays = arrays
        self.feature = trees.feature_SN[idx].numpy()
        self.split = trees.threshold_SN[idx].numpy()
        self.missing = trees.missing_left_SN[idx].numpy()
        leaf_LE = trees.leaf_embedding_SLE[idx].numpy()
        self.leaf = leaf_LE.sum(axis=1)
        self.target = int(np.abs(leaf_LE).sum(axis=0).argmax())

    def add(self, node: int) -> tuple[int, bool]:
        """Add what hangs at a node; return its place, and whether that is a leaf."""
        num_inner = self.feature.size
        while node < num_inner and np.isinf(self.split[node]) and self.missing[node]:
            node = 2 * node + 1  # everything goes to the left
        arrays = self.arrays
        if node >= num_inner:
            arrays.weight.append(float(self.leaf[node - num_inner]))
            arrays.target.append(self.target)
            return len(arrays.weight) - 1, True
        return self.add_inner(node), False

    def add_inner(self, node: int) -> int:
        """Add an inner node with all that is below it; return its place."""
        arrays, place = self.arrays, len(self.arrays.feature)
        arrays.feature.append(int(self.feature[node]))
        arrays.split.append(float(self.split[node]))
        arrays.missing.append(int(self.missing[node]))
        for side in (0, 1):
            arrays.child[side].append(0)
            arrays.is_leaf[side].append(0)
        for side in (0, 1):
            child, is_leaf = self.add(2 * node + 1 + side)
            arrays.child[side][place], arrays.is_leaf[side][place] = child, int(is_leaf)
        return place


def tree_node(trees: TreeEnsemble, rows: str, output: str) -> onnx.NodeProto:
    """Return a node that reads rows [N, F] and gives the sum of each answer [N, E].

    Args:
        trees: At least one; each of its leaves speaks of one and the same answer.
        rows: Name of the input.
        output: Name of the output.
    """
    arrays = _Arrays()
    for idx in range(trees.leaf_SL.shape[0]):
        arrays.roots.append(_Tree(arrays, trees, idx).add_inner(0))
    node = helper.make_node("TreeEnsemble", [rows], [output], domain=DOMAIN)
    whole = {
        "aggregate_function": _SUM,
        "post_transform": 0,
        "n_targets": trees.leaf_embedding_SLE.shape[2],
        "tree_roots": arrays.roots,
        "nodes_featureids": arrays.feature,
        "nodes_missing_value_tracks_true": arrays.missing,
        "nodes_truenodeids": arrays.child[0],
        "nodes_falsenodeids": arrays.child[1],
        "nodes_trueleafs": arrays.is_leaf[0],
        "nodes_falseleafs": arrays.is_leaf[1],
        "leaf_targetids": arrays.target,
    }
    node.attribute.extend(helper.make_attribute(*each) for each in whole.items())
    modes = np.full(len(arrays.feature), _LESS_THAN, np.uint8)
    node.attribute.append(_tensor("nodes_modes", modes))
    node.attribute.append(_tensor("nodes_splits", np.array(arrays.split, np.float32)))
    node.attribute.append(_tensor("leaf_weights", np.array(arrays.weight, np.float32)))
    return node


def _tensor(name: str, values: NDArray[np.generic]) -> onnx.AttributeProto:
    return helper.make_attribute(name, numpy_helper.from_array(values, name))
