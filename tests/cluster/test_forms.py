"""The typed JSON of a task: what a TaskSpec makes of a body and of an answer."""

import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.forms import TaskForm
from cluster.schemas import InferResponse, ServiceClass, Timings
from core_model.builtin_tasks import FRAUD
from core_model.tasks import ExtraSpec, TaskSpec

FORM = TaskForm(FRAUD)
CONTEXT = FRAUD.extras["context"].columns


def spec(**changes: Any) -> TaskSpec:  # noqa: ANN401 - passed on
    """A task without names: rows of 3, one extra line of 2 whole numbers per row."""
    fields: dict[str, Any] = {
        "name": "plain",
        "d_task": 3,
        "outputs": ("low", "high"),
        "build_adapter": FRAUD.build_adapter,
        "build_head": FRAUD.build_head,
        "count_tokens": FRAUD.count_tokens,
        "max_rows": 4,
        "max_tokens": 4,
        "service_class": "interactive",
        "deadline_ms": 250.0,
        "extras": {"marks": ExtraSpec(width=2, dtype="int32", per="row")},
    }
    return TaskSpec(**{**fields, **changes})


def fraud_body(num_rows: tuple[int, ...] = (2, 1), **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    """A body with row r of sequence s full of the value 10 s + r."""
    sequences = [
        {
            "rows": [dict.fromkeys(FRAUD.columns, 10 * s + r) for r in range(count)],
            "extras": {"context": {name: i + s for i, name in enumerate(CONTEXT)}},
        }
        for s, count in enumerate(num_rows)
    ]
    return {"sequences": sequences, **fields}


def test_named_columns_become_rows_in_the_order_of_the_task() -> None:
    body = fraud_body()
    row = body["sequences"][0]["rows"][0]
    row.update({name: float(i) for i, name in enumerate(reversed(FRAUD.columns))})
    row["ratio"] = None
    request = FORM.to_request(FORM.body.model_validate(body), "given", "tenant")
    assert request.features.dtype == np.float32
    np.testing.assert_array_equal(request.features[0], [6, 5, 4, 3, 2, 1, np.nan])
    np.testing.assert_array_equal(request.features[1:, 0], [1, 10])
    np.testing.assert_array_equal(request.cu_seqlens, [0, 2, 3])
    np.testing.assert_array_equal(request.extras["context"][1], np.arange(24) + 1)
    assert (request.request_id, request.tenant, request.task) == ("given", "tenant", "fraud")
    assert (request.service_class, request.deadline_ms) == (ServiceClass.STREAM, 1000.0)


def test_a_body_may_name_what_it_wants() -> None:
    body = fraud_body(
        request_id="mine",
        tenant="me",
        service_class="interactive",
        deadline_ms=40,
        model_version="v2",
    )
    request = FORM.to_request(FORM.body.model_validate_json(json.dumps(body)), "other", "other")
    assert (request.request_id, request.tenant, request.model_version) == ("mine", "me", "v2")
    assert (request.service_class, request.deadline_ms) == (ServiceClass.INTERACTIVE, 40.0)


def test_columns_without_names_are_places_in_a_list() -> None:
    form = TaskForm(spec())
    sequence = {"rows": [[1, 2, None], [4, 5, 6]], "extras": {"marks": [[1, 2], [3, 4]]}}
    request = form.to_request(form.body.model_validate({"sequences": [sequence]}), "r", "t")
    np.testing.assert_array_equal(request.features, [[1, 2, np.nan], [4, 5, 6]])
    assert request.extras["marks"].dtype == np.int32
    np.testing.assert_array_equal(request.extras["marks"], [[1, 2], [3, 4]])


def test_a_task_without_extras_has_none_in_its_body() -> None:
    form = TaskForm(spec(extras={}))
    request = form.to_request(
        form.body.model_validate({"sequences": [{"rows": [[1, 2, 3]]}]}), "r", "t"
    )
    assert request.extras == {}


def test_a_column_may_be_called_like_a_method() -> None:
    form = TaskForm(spec(columns=("json", "copy", "model_fields"), extras={}))
    body = form.body.model_validate(
        {"sequences": [{"rows": [{"json": 1, "copy": 2, "model_fields": 3}]}]}
    )
    np.testing.assert_array_equal(form.to_request(body, "r", "t").features, [[1, 2, 3]])


def change(body: dict[str, Any], where: str, value: object) -> dict[str, Any]:
    """Put a value at a dotted place, or take the place out for ``...``."""
    *path, last = [int(step) if step.isdigit() else step for step in where.split(".")]
    place: Any = body
    for step in path:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return body


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("sequences", []),
        ("sequences", ...),
        ("sequences.0.rows", []),
        ("sequences.0.rows", [{}] * (FRAUD.max_rows + 1)),
        ("sequences.0.rows.0.amount", ...),
        ("sequences.0.rows.0.amount", "12.5"),
        ("sequences.0.rows.0.amount", True),
        ("sequences.0.rows.0.amount", float("nan")),
        ("sequences.0.rows.0.amount", 1e39),
        ("sequences.0.rows.0.extra", 1),
        ("sequences.0.extras", ...),
        ("sequences.0.extras.context.C_GAP", ...),
        ("sequences.0.extras.other", {}),
        ("deadline_ms", 0),
        ("deadline_ms", float("inf")),
        ("service_class", "urgent"),
        ("model_version", "../x"),
        ("tenant", "a b"),
        ("request_id", ""),
        ("surprise", 1),
    ],
)
def test_what_does_not_fit_the_task_is_refused_at_its_place(where: str, value: object) -> None:
    body = change(fraud_body(), where, value)
    with pytest.raises(ValidationError) as caught:
        FORM.body.model_validate(body)
    place = [str(step) for step in caught.value.errors()[0]["loc"]]
    assert place[: len(where.split("."))] == where.split(".")


def test_an_answer_names_its_outputs_and_writes_null_for_what_is_not_finite() -> None:
    form = TaskForm(spec())
    response = InferResponse(
        request_id="r",
        outputs=np.array([[1, np.nan], [3, np.inf], [5, 6]], dtype=np.float32),
        cu_seqlens=np.array([0, 2, 2, 3], dtype=np.int32),
        status=np.array([1, 0, 7], dtype=np.uint8),
        model_version="v1",
        timings=Timings(1.0, 2.0),
        tokens_per_expert=np.zeros((1, 1), dtype=np.int64),
    )
    answer = form.to_answer(response)
    form.answer.model_validate(answer)
    assert answer["sequences"] == [
        {"status": "non_finite", "rows": [{"low": 1, "high": None}, {"low": 3, "high": None}]},
        {"status": "ok", "rows": []},
        {"status": "unknown", "rows": [{"low": 5, "high": 6}]},
    ]
    assert (answer["model_version"], answer["queued_ms"]) == ("v1", 1.0)


@pytest.mark.parametrize(
    "columns", [("a", "b"), ("a", "a", "b"), ("a", "b", "c d"), ("a", "", "c"), ("a", "b", "1")]
)
def test_a_spec_with_names_that_do_not_fit_is_refused(columns: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="columns: expected 3 different names"):
        spec(columns=columns)
    with pytest.raises(ValueError, match="columns: expected 3 different names"):
        ExtraSpec(width=3, columns=columns)
