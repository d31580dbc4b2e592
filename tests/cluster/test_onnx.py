"""The client on ONNX Runtime: the same types, named errors, nothing heavy."""

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cluster.client import Client, infer_blocking
from cluster.errors import (
    CheckpointError,
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
)
from cluster.onnx import OnnxClient
from cluster.schemas import InferRequest, SequenceStatus

ROOT = Path(__file__).parents[2]
WEIGHT = np.arange(6, dtype=np.float32).reshape(3, 2)


def write_model(path: Path, *, input_name: str = "features", ends: bool = False) -> Path:
    """Write twice = 2 * features and sum = features @ WEIGHT; with ``ends``, sqrt of it."""
    nodes = [
        helper.make_node("Add", [input_name, input_name], ["twice"]),
        helper.make_node("MatMul", [input_name, "w"], ["s0"]),
        helper.make_node("Sqrt" if ends else "Identity", ["s0"], ["sum"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["n", 3])],
        [
            helper.make_tensor_value_info("twice", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n", 2]),
        ],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def open_client(path: Path, **settings: object) -> OnnxClient:
    outputs = settings.pop("outputs", ("sum", "twice"))
    return OnnxClient(path, task="forecast", version="v7", outputs=outputs)  # type: ignore[arg-type]


def request(
    features: NDArray[np.float32], lengths: list[int] | None = None, **fields: object
) -> InferRequest:
    ends = np.cumsum([0, *(lengths or [1] * len(features))]).astype(np.int32)
    fields = {"task": "forecast", **fields}
    return InferRequest(request_id="r", tenant="t", features=features, cu_seqlens=ends, **fields)  # type: ignore[arg-type]


def test_outputs_are_side_by_side_in_the_order_asked_for(tmp_path: Path) -> None:
    client: Client = open_client(write_model(tmp_path / "m.onnx"))
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    answer = infer_blocking(client, request(features))
    np.testing.assert_allclose(answer.outputs[:, :2], features @ WEIGHT, rtol=1e-5)
    np.testing.assert_array_equal(answer.outputs[:, 2:], 2 * features)
    assert answer.cu_seqlens.tolist() == [0, 1, 2, 3, 4, 5]
    assert answer.model_version == "v7"
    assert answer.timings.compute_ms > 0


def test_no_rows_are_answered_with_none(tmp_path: Path) -> None:
    client = open_client(write_model(tmp_path / "m.onnx"))
    assert client.answer(request(np.zeros((0, 3), np.float32))).outputs.shape == (0, 5)


def test_a_row_without_a_finite_answer_is_marked_and_the_others_are_not(tmp_path: Path) -> None:
    client = open_client(write_model(tmp_path / "m.onnx", ends=True))
    features = np.array([[1, 1, 1], [-1, -1, -1]], np.float32)
    status = client.answer(request(features)).status
    assert status.tolist() == [SequenceStatus.OK, SequenceStatus.NON_FINITE]


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"task": "fraud"}, InvalidRequestError, "expected forecast, got fraud"),
        ({"model_version": "v8"}, UnknownModelError, "expected stable or v7, got v8"),
        ({"lengths": [2, 2]}, InvalidRequestError, "one row per sequence"),
        ({"lengths": [0, 2, 1, 1]}, InvalidRequestError, "one row per sequence"),
        ({"deadline_ms": 1e-9}, DeadlineExceededError, "the model took"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    tmp_path: Path, fields: dict[str, object], error: type[Exception], text: str
) -> None:
    client = open_client(write_model(tmp_path / "m.onnx"))
    with pytest.raises(error, match=text):
        client.answer(request(np.zeros((4, 3), np.float32), **fields))  # type: ignore[arg-type]


def test_another_width_is_refused_before_it_is_run(tmp_path: Path) -> None:
    client = open_client(write_model(tmp_path / "m.onnx"))
    with pytest.raises(InvalidRequestError, match="expected 3 columns, got 4"):
        client.answer(request(np.zeros((1, 4), np.float32)))


def test_the_async_form_answers_alike(tmp_path: Path) -> None:
    client = open_client(write_model(tmp_path / "m.onnx"))
    question = request(np.ones((1, 3), np.float32), model_version="v7")
    answer = asyncio.run(client.infer(question))
    np.testing.assert_array_equal(answer.outputs, client.answer(question).outputs)


def test_a_file_that_is_no_such_model_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="expected an ONNX model"):
        open_client(broken)
    with pytest.raises(CheckpointError, match=r"missing\.onnx"):
        open_client(tmp_path / "missing.onnx")
    with pytest.raises(CheckpointError, match="got rows"):
        open_client(write_model(tmp_path / "other.onnx", input_name="rows"))
    with pytest.raises(CheckpointError, match="outputs hazard"):
        open_client(write_model(tmp_path / "m.onnx"), outputs=("hazard",))


def test_a_model_that_fails_says_so(tmp_path: Path) -> None:
    model = onnx.load(write_model(tmp_path / "m.onnx"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([7, 7], np.int64), "seven"))
    model.graph.node[2].CopyFrom(helper.make_node("Reshape", ["s0", "seven"], ["sum"]))
    del model.graph.output[1]
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["a", "b"]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    client = open_client(tmp_path / "m.onnx")
    with pytest.raises(UnavailableError, match="model v7: expected an answer"):
        client.answer(request(np.zeros((2, 3), np.float32)))


def test_it_runs_without_torch_ray_pandas_and_pyarrow() -> None:
    probe = (
        "import sys, cluster.onnx; "
        "print([m for m in ('torch', 'ray', 'pandas', 'pyarrow', 'core_model') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
