import json
from dataclasses import replace

import pytest

from core_model.config import PRESETS, MoEConfig

LOW_RANK = {"q_rank": 8, "kv_rank": 8, "d_nope": 4, "d_rope": 2, "d_value": 6}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_manifest_gives_back_the_configuration(preset: str) -> None:
    stored = json.loads(json.dumps(PRESETS[preset].to_dict()))
    assert MoEConfig.from_dict(stored) == PRESETS[preset]


def test_heads_share_the_width() -> None:
    assert MoEConfig(d_model=96, num_heads=3).d_head == 32


def test_low_rank_heads_have_the_width_of_their_two_parts() -> None:
    assert replace(MoEConfig(), **LOW_RANK).d_head == 6
    assert PRESETS["deepseek-v3"].d_head == 192


def test_a_manifest_from_before_a_field_means_its_default() -> None:
    stored = {"d_model": 64, "num_layers": 2}
    assert MoEConfig.from_dict(stored) == MoEConfig(d_model=64, num_layers=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected above 0, got 0"),
        ({"rms_eps": -1e-6}, "rms_eps: expected above 0"),
        ({"num_heads": 3}, "num_heads 3 must divide d_model 128"),
        ({"num_chosen": 17}, "num_chosen 17 exceeds num_experts 16"),
        ({"num_groups": 3}, "num_groups 3 must cut num_experts 16 into equal ones"),
        ({"num_groups": 16}, "num_groups 16 must cut num_experts 16 into equal ones from 2"),
        ({"chosen_groups": 2}, "chosen_groups 2 exceeds num_groups 1"),
        ({"num_groups": 8, "num_chosen": 3}, "num_chosen 3 exceeds the 2 of chosen_groups"),
        ({"dense_layers": 4, "d_dense": 8}, "dense_layers 4 must leave some of num_layers 4"),
        ({"dense_layers": 1}, r"dense_layers, d_dense: expected both or none, got \(1, 0\)"),
        ({"d_dense": -1}, "d_dense: expected from 0, got -1"),
        ({"kv_rank": 8}, r"d_value: expected all or none, got \(0, 8, 0, 0, 0\)"),
        ({**LOW_RANK, "d_rope": 3}, "d_rope: expected an even width, got 3"),
        ({**LOW_RANK, "d_value": 7}, "d_value 7 exceeds d_nope \\+ d_rope 6"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MoEConfig(), **change)


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected only known keys, got \['d_modle'\]"):
        MoEConfig.from_dict({"d_modle": 128})
