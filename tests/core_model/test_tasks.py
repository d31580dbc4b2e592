from importlib.metadata import EntryPoint

import pytest

from core_model import tasks
from core_model.builtin_tasks import FRAUD


def declare(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, tasks.ENTRY_POINT_GROUP)
    monkeypatch.setattr(tasks, "entry_points", lambda group: [point])


def test_the_fraud_task_is_registered() -> None:
    assert tasks.registered_tasks()["fraud"] is FRAUD


def test_what_a_distribution_declares_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "fraud", "core_model.builtin_tasks:FRAUD")
    assert tasks.registered_tasks.__wrapped__() == {"fraud": FRAUD}


@pytest.mark.parametrize(
    ("name", "value"), [("pi", "math:pi"), ("theft", "core_model.builtin_tasks:FRAUD")]
)
def test_an_entry_point_that_is_not_its_task_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    declare(monkeypatch, name, value)
    with pytest.raises(TypeError, match=f"{name} = {value}: expected a TaskSpec named '{name}'"):
        tasks.registered_tasks.__wrapped__()


def test_a_fraud_answer_explains_every_context_feature() -> None:
    width = FRAUD.extras["context"].width
    assert FRAUD.outputs[:4] == ("logit", "tree_logit", "sequence_logit", "gate")
    assert FRAUD.outputs[4:] == tuple(f"contribution_{i}" for i in range(width))
