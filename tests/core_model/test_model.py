from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from core_model.builtin_tasks import FRAUD
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch, take_sequences

MakeBatch = Callable[..., RaggedBatch]
LENGTHS = (4, 1, 9, 2, 6)


def outputs(model: MoETransformer, **batches: RaggedBatch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {task: rows for task, (rows, _) in model(batches).outputs.items()}


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_order_of_sequences_does_not_matter(model: MoETransformer, make_batch: MakeBatch) -> None:
    batch, order = make_batch(LENGTHS), torch.tensor([3, 0, 4, 2, 1])
    shuffled = outputs(model, fraud=take_sequences(batch, order))["fraud"]
    near(shuffled, outputs(model, fraud=batch)["fraud"][order])


def test_requests_of_one_step_answer_as_requests_alone(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    batch = make_batch(LENGTHS)
    parts = [take_sequences(batch, torch.tensor(part)) for part in ([0, 1], [2], [3, 4])]
    alone = torch.cat([outputs(model, fraud=part)["fraud"] for part in parts])
    near(outputs(model, fraud=batch)["fraud"], alone)


def test_tasks_of_one_step_answer_as_tasks_alone(
    make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = replace(FRAUD, name="twin")
    monkeypatch.setattr("core_model.model.registered_tasks", lambda: {"fraud": FRAUD, "twin": twin})
    torch.manual_seed(0)
    model = MoETransformer(PRESETS["tiny"], ["fraud", "twin"]).eval()
    one, other = make_batch(LENGTHS, seed=1), make_batch((3, 8), seed=2)
    alone = outputs(model, fraud=one) | outputs(model, twin=other)
    assert not torch.allclose(alone["twin"], outputs(model, fraud=other)["fraud"], atol=1e-3)
    for together in (outputs(model, fraud=one, twin=other), outputs(model, twin=other, fraud=one)):
        for task in ("fraud", "twin"):
            near(together[task], alone[task])


def test_a_step_names_the_experts_of_every_token(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    with torch.no_grad():
        step = model({"fraud": make_batch(LENGTHS)})
    tokens = 3 * len(LENGTHS)
    assert step.experts_LTK.shape == (model.config.num_layers, tokens, model.config.num_chosen)
    assert step.experts_LTK.min() >= 0
    assert step.experts_LTK.max() < model.config.num_experts
    assert step.cu_tokens.tolist() == list(range(0, tokens + 1, 3))


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"tasks: expected names among .*fraud.*, got \['weather'\]"
    ):
        MoETransformer(PRESETS["tiny"], ["weather"])
