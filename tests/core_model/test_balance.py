from dataclasses import replace

import pytest
import torch

from core_model.balance import (
    BalanceLoss,
    expert_load,
    move_bias,
    solve_bias,
    uniform_utilisation,
    utilisation,
)
from core_model.config import PRESETS
from core_model.model import MoETransformer

CHOICES_LTK = torch.tensor([[[0, 1], [0, 2], [0, 1]], [[3, 2], [2, 3], [1, 0]]], dtype=torch.int32)


def test_load_counts_choices() -> None:
    load_LE = expert_load(CHOICES_LTK, 4)
    assert load_LE.tolist() == [[3, 2, 1, 0], [1, 1, 2, 2]]
    assert load_LE.dtype == torch.float64


def test_a_weighted_token_loads_its_experts_by_its_weight() -> None:
    load_LE = expert_load(CHOICES_LTK, 4, torch.tensor([1.0, 10.0, 100.0]))
    assert load_LE.tolist() == [[111, 101, 10, 0], [100, 100, 11, 11]]


def test_utilisation_is_mean_over_maximum() -> None:
    load_LE = torch.tensor([[4.0, 4.0], [6.0, 2.0], [8.0, 0.0]])
    torch.testing.assert_close(utilisation(load_LE), torch.tensor([1.0, 2 / 3, 0.5]))


def test_a_step_moves_the_bias_of_a_task_against_its_load(model: MoETransformer) -> None:
    layer, (*_, task) = model.moe_layers[1], model.adapters
    before_OE = layer.expert_bias.clone()
    load_LE = torch.tensor([[5.0, 5, 5, 5], [20.0, 0, 0, 0]])
    move_bias(model, task, load_LE, 0.1)
    moved_OE = layer.expert_bias - before_OE
    torch.testing.assert_close(moved_OE[-1], torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    assert not moved_OE[:-1].any()


def test_solved_biases_level_skewed_scores() -> None:
    torch.manual_seed(0)
    scores_TE = torch.sigmoid(torch.randn(4000, 8) + torch.linspace(-2, 2, 8))

    def level(bias_E: torch.Tensor) -> float:
        chosen_TK = (scores_TE + bias_E).topk(2, dim=1).indices
        return float(utilisation(expert_load(chosen_TK.unsqueeze(0), 8)))

    assert level(torch.zeros(8)) < 0.5
    bias_E = solve_bias(scores_TE, torch.zeros(8), 2)
    assert level(bias_E) >= 0.97
    assert abs(float(bias_E.mean())) < 1e-6


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [(40, 4, 2), (200, 16, 3)])
def test_uniform_utilisation_is_that_of_tokens_drawn_one_by_one(
    num_tokens: int, num_experts: int, num_chosen: int
) -> None:
    torch.manual_seed(0)
    drawn = torch.rand(2000, num_tokens, num_experts).topk(num_chosen).indices
    levels = utilisation(expert_load(drawn, num_experts))
    error = float(levels.std()) * (1 / 2000 + 1 / 4000) ** 0.5
    got = uniform_utilisation(num_tokens, num_experts, num_chosen, draws=4000)
    assert got == pytest.approx(float(levels.mean()), abs=4 * error)


def test_uniform_utilisation_at_its_ends() -> None:
    assert uniform_utilisation(1, 8, 1) == pytest.approx(1 / 8)
    assert uniform_utilisation(5, 4, 4) == 1.0
    assert uniform_utilisation(10**9, 16, 2) > 0.999


@pytest.mark.slow
def test_the_loss_levels_a_skewed_load() -> None:
    torch.manual_seed(0)
    model = MoETransformer(replace(PRESETS["tiny"], num_layers=1, num_experts=8), [])
    (layer,) = model.moe_layers
    x_TD = torch.randn(300, 32) + 1.5 * torch.randn(32)  # alike, so that few experts are liked

    def level() -> float:
        return float(utilisation(expert_load(layer(x_TD)[1].unsqueeze(0), 8)))

    before, values = level(), []
    optimizer = torch.optim.Adam([layer.router], lr=0.01)
    with BalanceLoss(model, weight=0.5) as balance:
        for _ in range(60):
            layer(x_TD)
            optimizer.zero_grad()
            value = balance.take()
            value.backward()
            optimizer.step()
            values.append(float(value.detach()))
    assert before < 0.5
    assert level() > 0.8
    assert values[-1] < values[0]
    assert values[-1] == pytest.approx(0.5, abs=0.01)  # the weight, at balance
    assert not layer.expert_bias.any()


def test_the_loss_is_the_formula_with_tokens_by_weight() -> None:
    torch.manual_seed(0)
    model = MoETransformer(replace(PRESETS["tiny"], num_layers=1), [])
    (layer,) = model.moe_layers
    x_TD, weights_T = torch.randn(3, 32), torch.tensor([1.0, 0.0, 3.0])
    with BalanceLoss(model, weight=2.0) as balance:
        _, experts_TK = layer(x_TD)
        got = balance.take(weights_T)
        assert float(balance.take()) == 0.0  # each step counts once
    scores = (x_TD @ layer.router.T).sigmoid()
    load, share = torch.zeros(4), torch.zeros(4)
    for t, weight in enumerate(weights_T.tolist()):
        share += weight / 4.0 * scores[t] / scores[t].sum()
        for e in experts_TK[t].tolist():
            load[e] += weight
    torch.testing.assert_close(got, 2.0 * (load / load.mean() * share).sum())


def test_nothing_is_seen_outside_or_without_a_weight(model: MoETransformer) -> None:
    (layer, _), x_TD = model.moe_layers, torch.randn(4, 32)
    with BalanceLoss(model, weight=0.0) as balance:
        layer(x_TD)
        assert float(balance.take()) == 0.0
    with BalanceLoss(model, weight=1.0) as balance:
        with torch.no_grad():
            layer(x_TD)
        assert float(balance.take()) == 0.0
    layer(x_TD)
    assert float(balance.take()) == 0.0
    assert not layer._forward_hooks
