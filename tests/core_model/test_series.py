"""The tasks on series: packing, masks, trees as answers, hazards."""

import json

import numpy as np
import pytest
import torch
import xgboost

from core_model.config import PRESETS
from core_model.hazard import (
    TO_VISIT,
    HazardHead,
    LifeHead,
    bucket_columns,
    failed_by,
    fit_gate,
    hazard_loss,
    pinball_loss,
)
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch, offsets_from_lengths, take_sequences
from core_model.series import SeriesAdapter, ensemble_of_answers
from core_model.series_tasks import (
    FORECAST,
    HORIZONS,
    NUM_COMPONENTS,
    NUM_HAZARDS,
    RUL,
    RUL_LIVES,
)
from core_model.tasks import TaskSpec
from kernels.trees import tree_ensemble

LENGTHS = (3, 0, 7, 1)
SHAPE = (-1, len(HORIZONS), NUM_COMPONENTS)


def draw(task: TaskSpec, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> RaggedBatch:
    """Series with so many rows each; a tenth of everything is unknown."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = offsets_from_lengths(torch.tensor(lengths, dtype=torch.int32))
    rows = torch.randn(int(cu_seqlens[-1]), task.d_task, generator=generator)
    rows[:, 0] = (rows[:, 0] > 0).float()
    rows[:, 1] = rows[:, 1].abs() * 40
    rows[:, 2] = 0.0
    rows[:, 3:][torch.rand(rows[:, 3:].shape, generator=generator) < 0.1] = torch.nan
    context = torch.randn(len(lengths), task.extras["context"].width, generator=generator)
    context[:, 0] = torch.rand(len(lengths), generator=generator) * 100
    context[:, 1:][torch.rand(context[:, 1:].shape, generator=generator) < 0.1] = torch.nan
    return RaggedBatch(rows, cu_seqlens, {"context": context})


def build(task: TaskSpec) -> MoETransformer:
    torch.manual_seed(1)
    model = MoETransformer(PRESETS["tiny"], [task.name]).eval()
    adapter = model.adapters[task.name]
    assert isinstance(adapter, SeriesAdapter)
    adapter.fit_scaling(draw(task, seed=5))
    return model


@torch.no_grad()
def answer(model: MoETransformer, task: TaskSpec, batch: RaggedBatch) -> dict[str, torch.Tensor]:
    columns, offsets = model({task.name: batch}).outputs[task.name]
    assert offsets.tolist() == list(range(batch.num_sequences + 1))
    return dict(zip(task.outputs, columns.unbind(dim=1), strict=True))


@pytest.mark.parametrize("task", [FORECAST, RUL], ids=lambda task: task.name)
def test_packed_series_answer_as_each_alone(task: TaskSpec) -> None:
    model, batch = build(task), draw(task)
    together = answer(model, task, batch)
    for i in range(len(LENGTHS)):
        alone = answer(model, task, take_sequences(batch, torch.tensor([i])))
        for name, value in alone.items():
            torch.testing.assert_close(value[0], together[name][i], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("task", [FORECAST, RUL], ids=lambda task: task.name)
def test_a_row_moves_its_own_series_alone(task: TaskSpec) -> None:
    model, batch = build(task), draw(task)
    before = torch.stack(list(answer(model, task, batch).values()))
    batch.features[1, 4:] = 3.0
    after = torch.stack(list(answer(model, task, batch).values()))
    assert float((after[:, 0] - before[:, 0]).abs().max()) > 1e-4
    torch.testing.assert_close(after[:, 1:], before[:, 1:])


def test_unknown_is_not_zero() -> None:
    model, batch = build(RUL), draw(RUL)
    known = {"context": torch.nan_to_num(batch.extras["context"])}
    filled = answer(model, RUL, RaggedBatch(batch.features, batch.cu_seqlens, known))
    unknown = answer(model, RUL, batch)
    assert not torch.allclose(filled["sequence_life"], unknown["sequence_life"])
    assert all(bool(column.isfinite().all()) for column in unknown.values())


def test_horizons_are_monotone_and_quantiles_in_order() -> None:
    found = answer(build(FORECAST), FORECAST, draw(FORECAST))
    for component in range(NUM_COMPONENTS):
        chances = torch.stack([found[f"prob_{h}h_{component}"] for h in HORIZONS])
        assert bool((chances.diff(dim=0) >= 0).all())
    hours = torch.stack([found[f"log_hours_{q}"] for q in (5, 50, 95)])
    assert bool((hours.diff(dim=0) > 0).all())


def test_sequence_hazards_are_blind_to_the_trees() -> None:
    model, batch = build(FORECAST), draw(FORECAST)
    extras = {**batch.extras, "tree": torch.full((len(LENGTHS), NUM_HAZARDS), 3.0)}
    shown = answer(model, FORECAST, RaggedBatch(batch.features, batch.cu_seqlens, extras))
    plain = answer(model, FORECAST, batch)
    torch.testing.assert_close(shown["sequence_hazard_0"], plain["sequence_hazard_0"])
    assert not torch.allclose(shown["hazard_0"], plain["hazard_0"])
    assert not torch.allclose(shown["log_hours_50"], plain["log_hours_50"])


def test_the_gate_goes_from_the_trees_to_the_sequence_experts() -> None:
    model, batch = build(FORECAST), draw(FORECAST)
    head = model.heads[FORECAST.name]
    assert isinstance(head, HazardHead)
    head.gate.fill_(-50.0)
    assert float(answer(model, FORECAST, batch)["hazard_3"].abs().max()) < 1e-9  # no trees: 0
    head.gate.fill_(50.0)
    found = answer(model, FORECAST, batch)
    torch.testing.assert_close(found["hazard_3"], found["sequence_hazard_3"])
    life = build(RUL)
    head = life.heads[RUL.name]
    assert isinstance(head, LifeHead)
    head.gate.fill_(50.0)
    found = answer(life, RUL, draw(RUL))
    torch.testing.assert_close(found["life"], found["sequence_life"])


def test_buckets_know_where_the_coming_visit_lies() -> None:
    inside = bucket_columns(torch.tensor([4.0, 30.0, 300.0, torch.nan]))[:, :, 2]
    assert inside[:3].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert bool(inside[3].isnan().all())


def test_failing_by_a_horizon_is_not_surviving_each_bucket() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5]).view(1, 4, 1)
    survived = torch.cumprod(1 - torch.sigmoid(logits), dim=1)
    torch.testing.assert_close(failed_by(logits), 1 - survived)


def test_likelihood_counts_buckets_at_risk_and_looked_after() -> None:
    logits = torch.zeros(4, 4, 1)
    nats = float(np.log(2))
    hours = torch.tensor([[30], [100], [100], [30]])
    observed = torch.tensor([200, 200, 24, 30])
    got = hazard_loss(logits, hours, observed)
    expected = [3 * nats, 4 * nats, 2 * nats, 2 * nats]  # the bucket to 48 h was not seen whole
    assert got.tolist() == pytest.approx(expected)


def test_held_out_rows_choose_the_better_expert() -> None:
    hours = torch.randint(1, 100, (600, NUM_COMPONENTS), generator=torch.Generator().manual_seed(0))
    observed = torch.full((600,), 100)
    ends, starts = torch.tensor(HORIZONS), torch.tensor([0, *HORIZONS[:-1]])
    fails = (hours.unsqueeze(1) > starts.view(1, -1, 1)) & (
        hours.unsqueeze(1) <= ends.view(1, -1, 1)
    )
    knows, guesses = fails.float() * 4 - 2, torch.zeros(600, *SHAPE[1:])
    for tree, sequence, sign in ((knows, guesses, -1), (guesses, knows, 1)):
        gate = fit_gate(tree, sequence, lambda h: hazard_loss(h, hours, observed).sum())
        assert bool((gate.sign() == sign).all())


def test_quantile_loss_is_least_at_the_quantile() -> None:
    truth = torch.linspace(0, 1, 1001)
    best = torch.tensor([0.05, 0.5, 0.95])
    losses = [
        float(pinball_loss((best + d).expand(1001, 3), truth).mean()) for d in (-0.02, 0, 0.02)
    ]
    assert losses[1] == min(losses)


def test_trees_of_several_answers_are_the_trainers() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    y = np.stack([x[:, 0] > 0, np.nan_to_num(x[:, 1] * x[:, 2]) > 0.2, x[:, 3] < 1], axis=1)
    settings = {"objective": "binary:logistic", "base_score": 0.5, "max_depth": 3}
    booster = xgboost.train(settings, xgboost.DMatrix(x, y.astype(np.float32)), 7)
    ensemble = ensemble_of_answers(json.loads(bytes(booster.save_raw("json"))), 5)
    _, answers = tree_ensemble(torch.from_numpy(x), ensemble)
    expected = booster.predict(xgboost.DMatrix(x), output_margin=True)
    np.testing.assert_allclose(answers.numpy(), expected, atol=1e-5)


def test_installed_trees_are_asked_for_every_bucket() -> None:
    model, batch = build(FORECAST), draw(FORECAST)
    width = FORECAST.extras["context"].width + 3
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, width)).astype(np.float32)
    y = np.repeat((x[:, -1:] > 0), NUM_COMPONENTS, axis=1).astype(np.float32)
    settings = {"objective": "binary:logistic", "base_score": 0.5, "max_depth": 2}
    booster = xgboost.train(settings, xgboost.DMatrix(x, y), 5)
    adapter = model.adapters[FORECAST.name]
    assert isinstance(adapter, SeriesAdapter)
    adapter.set_ensemble(ensemble_of_answers(json.loads(bytes(booster.save_raw("json"))), width))
    context = batch.extras["context"]
    rows = torch.cat(
        [
            context.unsqueeze(1).expand(-1, len(HORIZONS), -1),
            bucket_columns(context[:, TO_VISIT]),
        ],
        dim=2,
    )
    margins = booster.predict(xgboost.DMatrix(rows.flatten(0, 1).numpy()), output_margin=True)
    expected = torch.from_numpy(margins).view(len(LENGTHS), NUM_HAZARDS)
    torch.testing.assert_close(adapter.answer(context), expected, atol=1e-5, rtol=1e-5)


def test_lives_have_an_answer_of_trees_each() -> None:
    adapter = build(RUL).adapters[RUL.name]
    assert isinstance(adapter, SeriesAdapter)
    assert adapter.shape.tree == len(RUL_LIVES)
