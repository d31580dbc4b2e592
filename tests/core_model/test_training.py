from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import core_model.training
from benchmarks.workload import TOKENS
from core_model.balance import utilisation
from core_model.builtin_tasks import FRAUD
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.training import (
    TrainSettings,
    WeightedSample,
    predict,
    rebalance_task,
    train_task,
)

MakeBatch = Callable[..., RaggedBatch]
Snapshot = list[Tensor]
SETTINGS = TrainSettings(epochs=6, batch_size=64, peak_lr=5e-3)


def parameters_of(model: nn.Module) -> Snapshot:
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def sample(make_batch: MakeBatch) -> WeightedSample:
    drawn = make_batch([1 + i % 4 for i in range(200)])
    extras = {**drawn.extras, "tree": torch.full((200, 25), torch.nan)}
    batch = RaggedBatch(drawn.features, drawn.cu_seqlens, extras)
    return WeightedSample(FRAUD.name, batch, torch.ones(200))


def train(
    sample: WeightedSample, settings: TrainSettings, seed: int = 0
) -> tuple[MoETransformer, list[float], list[Snapshot]]:
    """Learn the sign of a context feature; return model, losses, weights before each step."""
    torch.manual_seed(seed)
    model = MoETransformer(PRESETS["tiny"], [FRAUD.name])
    target_B = (torch.nan_to_num(sample.batch.extras["context"][:, 2]) > 0).float()
    losses: list[float] = []
    before: list[Snapshot] = []

    def loss(outputs: Tensor, chosen: Tensor) -> Tensor:
        value = functional.binary_cross_entropy_with_logits(outputs[:, 0], target_B[chosen])
        losses.append(float(value.detach()))
        before.append(parameters_of(model))
        return value

    train_task(model, sample, loss, settings, seed, lambda *_: None)
    return model, losses, before


def test_a_separable_problem_is_learnt(sample: WeightedSample) -> None:
    model, losses, _ = train(sample, SETTINGS)
    assert len(losses) == 6 * (200 // 64)
    assert losses[0] > 0.5
    assert losses[-1] < 0.5 * losses[0]
    outputs, _ = predict(model, FRAUD.name, sample.batch)
    right = (outputs[:, 0] > 0) == (sample.batch.extras["context"][:, 2] > 0)
    assert right.float().mean() > 0.9
    assert not model.training


def test_a_seed_fixes_the_weights(sample: WeightedSample) -> None:
    settings = replace(SETTINGS, epochs=1)
    states = [train(sample, settings, seed)[0].state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["final_norm"], states[2]["final_norm"])


def test_the_model_ends_with_the_averaged_weights(sample: WeightedSample) -> None:
    settings = replace(SETTINGS, epochs=2, average_from=0.5, average_decay=0.5)
    averaged, _, before = train(sample, settings)
    last, _, _ = train(sample, replace(settings, average_decay=0.0))
    assert len(before) == 6
    assert not torch.allclose(averaged.final_norm, last.final_norm, atol=2e-5, rtol=0.0)
    ends = zip(*before[4:], parameters_of(last), parameters_of(averaged), strict=True)
    for fourth, fifth, sixth, got in ends:  # three steps come before the average
        expected = (0.125 * fourth + 0.25 * fifth + 0.5 * sixth) / 0.875
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_rebalancing_levels_the_traffic_and_nothing_else(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    batch = make_batch([2] * 400)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer[0] += 1.0
    _, load_LE = predict(model, FRAUD.name, batch)
    assert float(utilisation(load_LE).max()) < 0.6
    weights = parameters_of(model)
    rebalance_task(model, FRAUD.name, batch)
    _, load_LE = predict(model, FRAUD.name, batch)
    assert float(utilisation(load_LE).min()) > 0.9
    assert all(map(torch.equal, parameters_of(model), weights))


def test_predictions_do_not_depend_on_the_chunks(
    model: MoETransformer, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch([3] * 20)
    whole, load_LE = predict(model, FRAUD.name, batch)
    monkeypatch.setattr(core_model.training, "CHUNK", 7)
    pieces, load_of_pieces_LE = predict(model, FRAUD.name, batch)
    torch.testing.assert_close(pieces, whole, atol=2e-5, rtol=2e-5)
    assert torch.equal(load_of_pieces_LE, load_LE)
    tokens = 3 * 20
    assert load_LE.sum(dim=1).tolist() == [tokens * model.config.num_chosen] * 2


def test_the_auxiliary_loss_balances_in_the_place_of_the_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(800, 32, generator=generator) + 1.5 * torch.randn(32, generator=generator)
    batch = RaggedBatch(rows, torch.arange(0, 801, 2, dtype=torch.int32), {})
    skewed = WeightedSample(TOKENS.name, batch, torch.ones(400))
    target_B = (rows[::2, 0] > rows[::2, 0].mean()).float()

    def loss(outputs: Tensor, chosen: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], target_B[chosen])

    def trained(**settings: float) -> MoETransformer:
        torch.manual_seed(0)
        model = MoETransformer(PRESETS["tiny"], [TOKENS.name])
        changed = TrainSettings(epochs=10, batch_size=100, peak_lr=1e-2, **settings)
        train_task(model, skewed, loss, changed, 0, lambda *_: None)
        return model

    by_loss, by_nothing = trained(balance_loss=1.0), trained(bias_rate=0.0)
    levels = [utilisation(predict(m, TOKENS.name, batch)[1]).mean() for m in (by_loss, by_nothing)]
    assert levels[0] > levels[1] + 0.1
    assert not any(bool(layer.expert_bias.any()) for layer in by_loss.moe_layers)


def test_a_sample_smaller_than_a_step_is_refused(sample: WeightedSample) -> None:
    model = MoETransformer(PRESETS["tiny"], [FRAUD.name])
    settings = replace(SETTINGS, batch_size=201)
    with pytest.raises(ValueError, match="at least 201 sequences, got 200"):
        train_task(model, sample, lambda out, _: out.sum(), settings, 0, print)
