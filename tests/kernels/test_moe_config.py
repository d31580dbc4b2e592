import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from kernels import moe_config
from kernels.moe_config import MoELaunch, MoESize, ProductLaunch, moe_launch, rule

SIZE = MoESize(8, 2, 256, 384, torch.bfloat16)
CUT = ProductLaunch(64, 64, 4, 3, swap=False, group=2)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Data of one layer: 16 rows for 8 tokens, 64 for 128."""
    entries = [
        {**SIZE.fields(), "tokens": tokens, **asdict(MoELaunch(rows, CUT, CUT)), "us": 1.0}
        for tokens, rows in ((8, 16), (128, 64))
    ]
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"entries": entries}))
    monkeypatch.setattr(moe_config, "TUNED", path)
    for cached in (moe_config._entries, moe_launch):
        cached.cache_clear()
    yield
    for cached in (moe_config._entries, moe_launch):
        cached.cache_clear()


@pytest.mark.usefixtures("tuned")
def test_the_nearest_number_of_tokens_is_taken_by_ratio() -> None:
    taken = [moe_launch(SIZE, tokens).block_rows for tokens in (0, 1, 31, 33, 9999)]
    assert taken == [16, 16, 16, 64, 64]
    assert moe_launch(SIZE, 8) == MoELaunch(16, CUT, CUT)


@pytest.mark.usefixtures("tuned")
def test_other_layers_and_other_tiles_go_by_the_rule() -> None:
    other = SIZE._replace(hidden=512)
    assert moe_launch(other, 8) == rule(other, 8)
    assert moe_launch(SIZE, 8, 64) == rule(SIZE, 8, 64)


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_the_left_operand_of_a_rule_fills_a_warp_group(block_rows: int, dtype: torch.dtype) -> None:
    size = MoESize(128, 8, 2048, 768, dtype)
    for tokens in (1, 64, 16384):
        config = rule(size, tokens, block_rows)
        assert config.block_rows == block_rows
        for product, parts in ((config.up, 2), (config.down, 1)):
            left = product.block_n * parts if product.swap else block_rows
            assert left >= 64 or dtype == torch.float32


def test_the_data_is_of_the_form_that_is_read() -> None:
    for size, entries in moe_config._entries().items():
        for entry in entries:
            config = MoELaunch.from_dict(entry)
            assert moe_launch(size, entry["tokens"]) == config
            assert config.block_rows in {16, 32, 64, 128}
