import torch

from core_model.balance import expert_load, move_bias, solve_bias, utilisation
from core_model.blocks import Block
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


def test_a_step_moves_the_bias_against_the_load(model: MoETransformer) -> None:
    block = model.blocks[1]
    assert isinstance(block, Block)
    before_E = block.moe.expert_bias.clone()
    load_LE = torch.tensor([[5.0, 5, 5, 5], [20.0, 0, 0, 0]])
    move_bias(model, load_LE, 0.1)
    moved_E = block.moe.expert_bias - before_E
    torch.testing.assert_close(moved_E, torch.tensor([-0.15, 0.05, 0.05, 0.05]))


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
