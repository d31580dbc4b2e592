from dataclasses import replace

import pytest
import torch

from core_model.config import PRESETS, MoEConfig
from core_model.model import MoETransformer
from core_model.packing import SpanGroup
from core_model.size import count_parameters
from kernels.attention import FULL

DEEPSEEK_WORDS = 129_280
PLAIN = PRESETS["tiny"]
GROUPED = replace(
    PLAIN,
    num_layers=3,
    num_experts=8,
    num_groups=4,
    chosen_groups=2,
    dense_layers=1,
    d_dense=48,
    q_rank=12,
    kv_rank=10,
    d_nope=6,
    d_rope=4,
    d_value=5,
)


@pytest.mark.parametrize("config", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_active_is_what_one_token_moves(config: MoEConfig) -> None:
    model = MoETransformer(config, [])
    group = SpanGroup(1, torch.tensor([0, 1], dtype=torch.int32), FULL)
    tokens_TD, _ = model.run_blocks(torch.randn(1, config.d_model), [group])
    tokens_TD.pow(3).sum().backward()
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if name.endswith(("moe.gate_up", "moe.down")):  # by expert
            assert parameter.grad is not None
            is_moved_E = parameter.grad.flatten(1).abs().sum(dim=1) > 0
            active += int(is_moved_E.sum()) * parameter[0].numel()
        else:
            active += parameter.numel()
    assert count_parameters(config) == (total, active)


def test_words_are_looked_up_and_scored_by_two_matrices() -> None:
    bare, count = count_parameters(PLAIN), count_parameters(PLAIN, vocabulary=100)
    assert count.total == bare.total + 2 * 100 * PLAIN.d_model
    assert count.active == bare.active + 100 * PLAIN.d_model


def test_deepseek_v3_has_its_published_size() -> None:
    """671 B in total and, as the document of its weights says, 36.6 B active: 37 B when rounded."""
    count = count_parameters(PRESETS["deepseek-v3"], vocabulary=DEEPSEEK_WORDS)
    assert count.total == pytest.approx(671e9, rel=0.01)
    assert count.active == pytest.approx(36.6e9, rel=0.01)
    assert round(count.active / 1e9) == 37


def test_presets_keep_to_their_sizes() -> None:
    assert count_parameters(PRESETS["base"]).total <= 6e6
    assert count_parameters(PRESETS["base"]).active <= 1.2e6
    assert count_parameters(PRESETS["large"]).active <= 300e6
