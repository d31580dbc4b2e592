"""Small real bundles for edge boxes, good and bad ones: shared by tests and ``edge_fleet``.

The model is a logistic one on a hidden layer, built as an ONNX graph.  Each ``Fault`` is a
model that goes wrong in its own way, always in the graph itself and not around it.

Legend: N windows, D features, K hidden units, C components, H horizons.
"""

from enum import StrEnum

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from apps.maintenance.edge.bundle import AlertRule, BundleInfo, encode_golden, pack
from apps.maintenance.sync.shadow import History

FEATURES = ("wear", "shock", "load", "temperature", "hours", "regime")
COMPONENTS = ("comp1", "comp2")
HORIZONS_H = (4.0, 24.0, 48.0)
HIDDEN = 96  # K: a file of some 10 kB, so that a delta has something to save
_REGIME = len(FEATURES) - 1  # 0 in golden batches; live data may have 1
_LOOPS = 12_000  # of the slow model: tens of milliseconds a request, on a fast machine too
_OPSET = 17


class Fault(StrEnum):
    """What is wrong with a model."""

    NONE = "none"
    GOLDEN = "golden"  # its outputs are not those it was signed with
    SLOW = "slow"  # right, and far too late
    RAISING = "raising"  # fails at every run
    RAISING_LIVE = "raising_live"  # fails where regime is 1
    ALARMING_LIVE = "alarming_live"  # sees a failure everywhere where regime is 1
    NAN_LIVE = "nan_live"  # not a number where regime is 1
    LATE = "late"  # right, with alarms hours later than they could be
    BROKEN = "broken"  # no ONNX file at all


def make_bundle(version: int, fault: Fault = Fault.NONE, *, seed: int = 0) -> bytes:
    """Return a bundle, packed; versions differ in a few weights, as after fine-tuning."""
    info = BundleInfo(
        version=version,
        task="forecast",
        features=FEATURES,
        variant="both",
        components=COMPONENTS,
        horizons_h=HORIZONS_H,
        alerts=AlertRule(horizon_h=48.0, threshold=0.5, max_share=0.5),
        accuracy={"macro_f1_48h": 0.9},
    )
    weights = _weights(version, seed, is_late=fault is Fault.LATE)
    features_ND = golden_features(seed)
    hazard_NCH, life_N3 = _reference(features_ND, *weights)
    if fault is Fault.GOLDEN:
        weights = (*weights[:2], weights[2] + np.float32(0.5))
    golden = encode_golden(features_ND, hazard_NCH, life_N3, tolerance=1e-3)
    model = b"no model" if fault is Fault.BROKEN else _model(weights, fault)
    return pack(info, golden, model)


def golden_features(seed: int = 0) -> NDArray[np.float32]:
    """Return inputs as they are in ordinary operation, regime 0, float32 [32, D]."""
    random = np.random.default_rng(seed)
    features_ND = random.uniform(0, 0.6, (32, len(FEATURES))).astype(np.float32)
    features_ND[:, _REGIME] = 0
    return features_ND


def make_history(num_machines: int, num_failures: int) -> History:
    """Return windows of machines that wear out over 100 hours, fail, are repaired and rest."""
    period_h = 200
    hours = np.arange(period_h * num_failures)
    wear = np.clip((hours % period_h - 100) / 100, 0, 1)  # from hour 100 on, failure at 200
    features_ND = np.full((num_machines * hours.size, len(FEATURES)), 0.1, np.float32)
    features_ND[:, 0] = np.tile(wear, num_machines)
    features_ND[:, _REGIME] = 0
    fails = np.arange(1, num_failures + 1) * period_h
    return History(
        features=features_ND,
        names=FEATURES,
        machine=np.repeat(np.arange(num_machines), hours.size),
        hour=np.tile(hours, num_machines),
        failure_machine=np.repeat(np.arange(num_machines), num_failures),
        failure_hour=np.tile(fails, num_machines),
        step_h=1,
    )


def _weights(
    version: int, seed: int, *, is_late: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return hidden [D, K], out [K, C * H] and bias [C * H]."""
    random = np.random.default_rng(seed)
    hidden_DK = random.normal(0, 0.05, (len(FEATURES), HIDDEN)).astype(np.float32)
    hidden_DK[0, : HIDDEN // 2] += 1  # wear, seen by half of the units
    hidden_DK[_REGIME] = 0
    out_KO = random.normal(0, 0.02, (HIDDEN, 6)).astype(np.float32)
    out_KO[: HIDDEN // 2] += 24 / HIDDEN
    tuned = np.random.default_rng(version)
    idx = tuned.choice(out_KO.size, 40, replace=False)
    out_KO.flat[idx] += tuned.normal(0, 1e-3, 40).astype(np.float32)
    # wear runs from 0 to 1 over 100 hours: alarms 40 hours ahead, the late model 10
    onset = np.float32(0.9 if is_late else 0.6)
    bias_O = np.tile(-12 * onset * np.array([1.3, 1.1, 1.0], np.float32), len(COMPONENTS))
    return hidden_DK, out_KO, bias_O.astype(np.float32)


def _reference(
    features_ND: NDArray[np.float32],
    hidden_DK: NDArray[np.float32],
    out_KO: NDArray[np.float32],
    bias_O: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    logit_NO = np.maximum(features_ND @ hidden_DK, 0) @ out_KO + bias_O
    hazard_NO = 1 / (1 + np.exp(-logit_NO))
    left_N1 = np.maximum(1 - features_ND[:, :1], 0) * 100
    life_N3 = np.concatenate([0.8 * left_N1, left_N1, 1.2 * left_N1], axis=1)
    shape = -1, len(COMPONENTS), len(HORIZONS_H)
    return hazard_NO.reshape(shape).astype(np.float32), life_N3.astype(np.float32)


def _model(
    weights: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]], fault: Fault
) -> bytes:
    hidden_DK, out_KO, bias_O = weights
    constants: dict[str, NDArray[np.generic]] = {
        "hidden": hidden_DK,
        "out": out_KO,
        "bias": bias_O,
        "shape": np.array([-1, len(COMPONENTS), len(HORIZONS_H)], np.int64),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "regime_from": np.array([_REGIME], np.int64),
        "regime_to": np.array([_REGIME + 1], np.int64),
        "axis": np.array([1], np.int64),
        "nil": np.array(0, np.float32),
        "full": np.array(1, np.float32),
        "ends": np.array([[80, 100, 120]], np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["features", "hidden"], ["h0"]),
        helper.make_node("Relu", ["h0"], ["h1"]),
        helper.make_node("MatMul", ["h1", "out"], ["l0"]),
        helper.make_node("Add", ["l0", "bias"], ["l1"]),
        helper.make_node("Sigmoid", ["l1"], ["p0"]),
        helper.make_node("Slice", ["features", "zero", "one", "axis"], ["wear"]),
        helper.make_node("Slice", ["features", "regime_from", "regime_to", "axis"], ["regime"]),
        helper.make_node("Sub", ["full", "wear"], ["r0"]),
        helper.make_node("Max", ["r0", "nil"], ["r1"]),
        helper.make_node("MatMul", ["r1", "ends"], ["life"]),
        *_fault_nodes(fault, constants),
        helper.make_node("Reshape", ["p1", "shape"], ["hazard"]),
    ]
    size = len(COMPONENTS), len(HORIZONS_H)
    graph = helper.make_graph(
        nodes,
        "edge",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", len(FEATURES)])],
        [
            helper.make_tensor_value_info("hazard", TensorProto.FLOAT, ["n", *size]),
            helper.make_tensor_value_info("life", TensorProto.FLOAT, ["n", 3]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _fault_nodes(fault: Fault, constants: dict[str, NDArray[np.generic]]) -> list[onnx.NodeProto]:
    """Return the way from the probabilities ``p0`` to ``p1``."""
    if fault is Fault.ALARMING_LIVE:
        return [helper.make_node("Max", ["p0", "regime"], ["p1"])]
    if fault is Fault.NAN_LIVE:  # sqrt(-1) where regime is 1
        return [
            helper.make_node("Neg", ["regime"], ["n0"]),
            helper.make_node("Sqrt", ["n0"], ["n1"]),
            helper.make_node("Add", ["p0", "n1"], ["p1"]),
        ]
    if fault in {Fault.RAISING, Fault.RAISING_LIVE}:  # an index behind the end of a table
        constants["table"] = np.zeros((1, 1), np.float32)
        constants["step"] = np.array(1000 if fault is Fault.RAISING else 0, np.float32)
        return [
            helper.make_node("Add", ["regime", "step"], ["i0"]),
            helper.make_node("Cast", ["i0"], ["i1"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "i1"], ["g0"], axis=0),
            helper.make_node("Squeeze", ["g0", "axis"], ["g1"]),
            helper.make_node("Add", ["p0", "g1"], ["p1"]),
        ]
    if fault is Fault.SLOW:
        return _slow_nodes(constants)
    return [helper.make_node("Identity", ["p0"], ["p1"])]


def _slow_nodes(constants: dict[str, NDArray[np.generic]]) -> list[onnx.NodeProto]:
    constants["trips"] = np.array(_LOOPS, np.int64)
    constants["go"] = np.array(True)
    constants["still"] = np.eye(64, dtype=np.float32)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["again"], ["more"]),
            helper.make_node("MatMul", ["value", "still"], ["next"]),
        ],
        "wait",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, [64, 64]),
        ],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [64, 64]),
        ],
    )
    constants["least"] = np.array(0, np.float32)
    return [
        helper.make_node("Loop", ["trips", "go", "still"], ["same"], body=body),
        helper.make_node("ReduceMin", ["same"], ["low"], keepdims=0),
        helper.make_node("Mul", ["low", "least"], ["none"]),
        helper.make_node("Add", ["p0", "none"], ["p1"]),
    ]
