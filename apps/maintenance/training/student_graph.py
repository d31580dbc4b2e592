"""An edge model as an ONNX graph: features -> probabilities of failing, and hours left.

    logit              tree + sigmoid(gate) * (student - tree)
    hazard [N, C, H]   1 - exp(-sum over the buckets up to h of softplus(logit))
    life   [N, 3]      expm1(quantiles of log(1 + hours)), widened by the margin, 0 .. cap

Missing features are not a number; the graph masks them itself, so that the box need not know.

Legend: N rows, D features, K cells, H buckets, C components.
"""

from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from apps.maintenance.edge.bundle import OUTPUTS
from apps.maintenance.intervals import OPEN_SHARE
from apps.maintenance.training.edge_net import EdgeNet, LifeScale
from apps.maintenance.training.student import UNKNOWN_VISIT, Student
from apps.maintenance.training.tree_node import DOMAIN as TREE_DOMAIN
from apps.maintenance.training.tree_node import OPSET as TREE_OPSET
from apps.maintenance.training.tree_node import tree_node
from cluster.onnx import INPUT_NAME
from core_model.hazard import NUM_BUCKET_COLUMNS
from core_model.series_tasks import HORIZONS, NUM_COMPONENTS
from kernels.trees import TreeEnsemble

OPSET, IR_VERSION = 17, 10  # ONNX Runtime 1.20 and later
_ALONG_COLUMNS = 1
_ENDS = np.array(HORIZONS, np.float32)
_STARTS = np.concatenate([[0], HORIZONS[:-1]]).astype(np.float32)
_SHAPE = np.array([-1, len(HORIZONS), NUM_COMPONENTS], np.int64)
_LAST = np.array([2], np.int64)


class _Visit(NamedTuple):
    """Names of whether the coming visit lies in each bucket [N, H], and is unknown [N, 1]."""

    within: str
    is_unknown: str


class _Graph:
    """Nodes and constants while a graph is written."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, value: NDArray[np.generic] | float | bool) -> str:
        """Return the name of a constant; numbers are float32."""
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        name = f"c{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, kind: str, *inputs: str, name: str = "", **attributes: int | float) -> str:
        """Add a node and return its output."""
        output = name or f"n{len(self.nodes)}"
        made = helper.make_node(kind, list(inputs), [output])
        made.attribute.extend(helper.make_attribute(*each) for each in attributes.items())
        self.nodes.append(made)
        return output

    def linear(self, x: str, layer: nn.Linear) -> str:
        """Add a linear layer."""
        weight, bias = (
            self.constant(_array(layer.weight).T.copy()),
            self.constant(_array(layer.bias)),
        )
        return self.node("Gemm", x, weight, bias)

    def silu(self, x: str) -> str:
        """Add x * sigmoid(x)."""
        return self.node("Mul", x, self.node("Sigmoid", x))


def to_onnx(net: EdgeNet) -> bytes:
    """Return an edge model as a model file of ``apps.maintenance.edge.bundle``."""
    graph, student = _Graph(), net.student
    width = student.first.in_features - student.column.numel() - len(HORIZONS)
    encoded, inside, visit = _encode(graph, student)
    x = graph.silu(graph.linear(encoded, student.first))
    x = graph.silu(graph.linear(x, student.second))
    sequence = _sequence(graph, x, inside, student)
    rows = _bucket_rows(graph, visit, width + NUM_BUCKET_COLUMNS)
    _hazard(graph, sequence, _trees(graph, rows, net.trees), net.gate)
    _life(graph, x, student, net.scale)
    size = NUM_COMPONENTS, len(HORIZONS)
    found = helper.make_graph(
        graph.nodes,
        "forecast",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["n", width])],
        [
            helper.make_tensor_value_info(OUTPUTS[0], TensorProto.FLOAT, ["n", *size]),
            helper.make_tensor_value_info(OUTPUTS[1], TensorProto.FLOAT, ["n", 3]),
        ],
        list(graph.constants.values()),
    )
    opset = [helper.make_opsetid("", OPSET), helper.make_opsetid(TREE_DOMAIN, TREE_OPSET)]
    model = helper.make_model(found, opset_imports=opset, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _encode(graph: _Graph, student: Student) -> tuple[str, str, _Visit]:
    """Add the encoding [N, K + D + H]; return it, where the visit lies [N, H], and that raw."""
    zero, one = graph.constant(0.0), graph.constant(1.0)
    unknown = graph.node("IsNaN", INPUT_NAME)
    filled = graph.node("Where", unknown, zero, INPUT_NAME)
    known = graph.node("Where", unknown, zero, one)
    column = graph.constant(_array(student.column))
    below = graph.node(
        "Sub",
        graph.node("Gather", filled, column, axis=_ALONG_COLUMNS),
        graph.constant(_array(student.low)),
    )
    share = graph.node("Div", below, graph.constant(_array(student.width)))
    share = graph.node("Clip", share, zero, one)
    share = graph.node("Mul", share, graph.node("Gather", known, column, axis=_ALONG_COLUMNS))
    visit = _visit(graph, student.to_visit, unknown, filled)
    inside = graph.node("Where", visit.is_unknown, graph.constant(UNKNOWN_VISIT), visit.within)
    return graph.node("Concat", share, known, inside, axis=_ALONG_COLUMNS), inside, visit


def _visit(graph: _Graph, to_visit: int, unknown: str, filled: str) -> _Visit:
    """Add whether the coming visit lies in each bucket."""
    idx = graph.constant(np.array([to_visit], np.int64))
    hours = graph.node("Gather", filled, idx, axis=_ALONG_COLUMNS)
    after = graph.node("Greater", hours, graph.constant(_STARTS))
    before = graph.node("LessOrEqual", hours, graph.constant(_ENDS))
    within = graph.node("Cast", graph.node("And", after, before), to=TensorProto.FLOAT)
    return _Visit(within, graph.node("Gather", unknown, idx, axis=_ALONG_COLUMNS))


def _sequence(graph: _Graph, x: str, inside: str, student: Student) -> str:
    """Add the student's hazards, logits [N, H, C]."""
    shape = graph.constant(_SHAPE)
    moved = graph.node("Reshape", graph.linear(x, student.inside), shape)
    moved = graph.node("Mul", moved, graph.node("Unsqueeze", inside, graph.constant(_LAST)))
    logit = graph.node("Reshape", graph.linear(x, student.outside), shape)
    return graph.node("Add", logit, moved)


def _bucket_rows(graph: _Graph, visit: _Visit, width: int) -> str:
    """Add what the trees read, the features with the columns of each bucket [N * H, D + 3]."""
    middle, last = graph.constant(np.array([1], np.int64)), graph.constant(_LAST)
    features = graph.node("Unsqueeze", INPUT_NAME, middle)
    features = graph.node("Concat", *([features] * len(HORIZONS)), axis=1)
    none = graph.node("Mul", graph.node("Unsqueeze", visit.within, last), graph.constant(0.0))
    bounds = graph.node("Add", none, graph.constant(np.stack([_STARTS, _ENDS], axis=1)[None]))
    inside = graph.node("Where", visit.is_unknown, graph.constant(np.nan), visit.within)
    inside = graph.node("Unsqueeze", inside, last)
    rows = graph.node("Concat", features, bounds, inside, axis=2)
    return graph.node("Reshape", rows, graph.constant(np.array([-1, width], np.int64)))


def _trees(graph: _Graph, rows: str, trees: TreeEnsemble) -> str:
    """Add the trees' hazards, logits [N, H, C]."""
    graph.nodes.append(tree_node(trees, rows, "trees"))
    return graph.node("Reshape", "trees", graph.constant(_SHAPE))


def _hazard(graph: _Graph, sequence: str, tree: str, gate: Tensor) -> None:
    """Add the probabilities of having failed by each horizon."""
    share = graph.constant(_array(gate.sigmoid()))
    apart = graph.node("Mul", graph.node("Sub", sequence, tree), share)
    logit = graph.node("Add", tree, apart)
    axis = graph.constant(np.array(1, np.int64))
    lost = graph.node("CumSum", graph.node("Softplus", logit), axis)
    alive = graph.node("Exp", graph.node("Neg", lost))
    failed = graph.node("Sub", graph.constant(1.0), alive)
    graph.nodes.append(helper.make_node("Transpose", [failed], [OUTPUTS[0]], perm=[0, 2, 1]))


def _life(graph: _Graph, x: str, student: Student, scale: LifeScale) -> None:
    """Add low end, median and high end of the hours left."""
    steps = graph.linear(x, student.hours.linear)
    down, middle, up = (
        graph.node("Gather", steps, graph.constant(np.array([i], np.int64)), axis=_ALONG_COLUMNS)
        for i in range(3)
    )
    cap = float(np.log1p(scale.cap_hours))
    low = graph.node("Sub", middle, graph.node("Softplus", down))
    low = graph.node("Sub", low, graph.constant(scale.margin))
    high = graph.node("Add", middle, graph.node("Softplus", up))
    is_open = graph.node("GreaterOrEqual", high, graph.constant(OPEN_SHARE * cap))
    high = graph.node("Add", high, graph.constant(scale.margin))
    high = graph.node("Where", is_open, graph.constant(cap), high)
    ends = [graph.node("Min", low, middle), middle, graph.node("Max", high, middle)]
    log_hours = graph.node("Concat", *ends, axis=_ALONG_COLUMNS)
    log_hours = graph.node("Clip", log_hours, graph.constant(0.0), graph.constant(cap))
    grown = graph.node("Exp", log_hours)
    graph.node("Sub", grown, graph.constant(1.0), name=OUTPUTS[1])


def _array(tensor: Tensor) -> NDArray[np.generic]:
    return np.asarray(tensor.detach().cpu().numpy())
