import torch
from torch.nn import functional

from core_model.config import PRESETS
from core_model.moe import MoELayer

CONFIG = PRESETS["tiny"]


def expert(x_D: torch.Tensor, gate_up_GD: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    gate_F, up_F = (gate_up_GD @ x_D).chunk(2)
    return down_DF @ (functional.silu(gate_F) * up_F)


def test_a_layer_is_its_shared_expert_and_a_weighted_sum_of_chosen_ones() -> None:
    torch.manual_seed(0)
    layer = MoELayer(CONFIG)
    layer.expert_bias[0] = torch.tensor([0.3, -0.2, 0.0, -0.1])
    x_TD = torch.randn(9, CONFIG.d_model)
    with torch.no_grad():
        got_TD, experts_TK = layer(x_TD)
        for x_D, got_D, chosen in zip(x_TD, got_TD, experts_TK.tolist(), strict=True):
            scores = torch.sigmoid(layer.router @ x_D)
            best = (scores + layer.expert_bias[0]).topk(CONFIG.num_chosen).indices.tolist()
            assert chosen == best
            expected = expert(x_D, layer.shared_gate_up, layer.shared_down)
            for e in best:
                weight = scores[e] / scores[best].sum()
                expected = expected + weight * expert(x_D, layer.gate_up[e], layer.down[e])
            torch.testing.assert_close(got_D, expected, atol=1e-4, rtol=1e-4)


def test_the_selection_bias_moves_choices_and_not_weights() -> None:
    torch.manual_seed(0)
    layer = MoELayer(CONFIG)
    x_TD = torch.randn(20, CONFIG.d_model)
    with torch.no_grad():
        before_TD, _ = layer(x_TD)
        layer.expert_bias += 5.0
        same_TD, _ = layer(x_TD)
        layer.expert_bias[0, 2] += 5.0
        _, experts_TK = layer(x_TD)
    assert torch.equal(same_TD, before_TD)
    assert bool((experts_TK == 2).any(dim=1).all())


def test_tokens_of_a_task_take_its_own_bias() -> None:
    torch.manual_seed(0)
    layer = MoELayer(CONFIG, 3)
    layer.expert_bias[:] = torch.randn(3, CONFIG.num_experts)
    x_TD = torch.randn(60, CONFIG.d_model)
    owner_T = torch.randint(3, (60,), dtype=torch.int32)
    with torch.no_grad():
        mixed_TD, mixed_TK = layer(x_TD, owner_T)
        for task in range(3):
            alone_TD, alone_TK = layer(x_TD[owner_T == task], task)
            assert torch.equal(mixed_TK[owner_T == task], alone_TK)
            torch.testing.assert_close(mixed_TD[owner_T == task], alone_TD)
    assert not torch.equal(layer(x_TD, 0)[1], layer(x_TD, 1)[1])


def test_every_parameter_learns_and_the_bias_does_not() -> None:
    torch.manual_seed(0)
    layer = MoELayer(CONFIG)
    layer(torch.randn(40, CONFIG.d_model))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0.0, name
    assert not layer.expert_bias.requires_grad
