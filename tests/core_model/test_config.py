import json
from dataclasses import replace

import pytest

from core_model.config import PRESETS, MoEConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_a_manifest_gives_back_the_configuration(preset: str) -> None:
    stored = json.loads(json.dumps(PRESETS[preset].to_dict()))
    assert MoEConfig.from_dict(stored) == PRESETS[preset]


def test_heads_share_the_width() -> None:
    assert MoEConfig(d_model=96, num_heads=3).d_head == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected above 0, got 0"),
        ({"rms_eps": -1e-6}, "rms_eps: expected above 0"),
        ({"num_heads": 3}, "num_heads 3 must divide d_model 128"),
        ({"num_chosen": 17}, "num_chosen 17 exceeds num_experts 16"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MoEConfig(), **change)


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected only known keys, got \['d_modle'\]"):
        MoEConfig.from_dict({"d_modle": 128})
