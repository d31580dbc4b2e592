"""A sequence in chunks, layer by layer, equals the same sequence in one piece."""

from collections.abc import Iterator

import pytest
import torch

from core_model.chunks import LayerInput, LongSequence, num_pieces
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import Encoded, offsets_from_lengths
from kernels.attention import FULL, AttentionPattern, varlen_attention

WINDOW = AttentionPattern(window=16, num_global=3)


@pytest.fixture(scope="module")
def model() -> Iterator[MoETransformer]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield MoETransformer(PRESETS["tiny"], ["fraud"]).eval()


def encode(num_tokens: int, pattern: AttentionPattern) -> Encoded:
    generator = torch.Generator().manual_seed(num_tokens)
    tokens_TD = torch.randn(num_tokens, PRESETS["tiny"].d_model, generator=generator)
    offsets = offsets_from_lengths(torch.tensor([num_tokens]))
    return Encoded(tokens_TD, offsets, offsets, {}, pattern)


@pytest.mark.parametrize("pattern", [FULL, WINDOW, AttentionPattern(window=8)], ids=str)
@pytest.mark.parametrize(("num_tokens", "chunk"), [(97, 32), (64, 64), (33, 2), (5, 7), (200, 199)])
def test_chunks_give_what_the_whole_gives(
    model: MoETransformer, pattern: AttentionPattern, num_tokens: int, chunk: int
) -> None:
    encoded = encode(num_tokens, pattern)
    expected_TD, experts_LTK = model.run_blocks(encoded.tokens_TD, [encoded.spans])
    long = LongSequence(model, "fraud", encoded, chunk)
    count = 0
    while not long.is_done:
        long.advance()
        count += 1
    assert count == num_pieces(num_tokens, chunk, len(model.blocks))
    torch.testing.assert_close(long.tokens_TD, expected_TD, rtol=1e-4, atol=1e-5)
    assert torch.equal(long.experts_LTK, experts_LTK)


@pytest.mark.parametrize(
    "chunk", [slice(0, 10), slice(2, 4), slice(10, 40), slice(39, 60)], ids=str
)
def test_a_chunk_sees_its_window_and_the_global_positions(chunk: slice) -> None:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(60, 3, 2, 8, generator=generator)
    whole = varlen_attention(
        qkv[:, 0], qkv[:, 1], qkv[:, 2], torch.tensor([0, 60], dtype=torch.int32), WINDOW
    )
    layer = LayerInput(torch.empty_like(qkv), WINDOW)
    for start in range(0, 60, 25):
        layer.put(slice(start, start + 25), qkv[start : start + 25])
    torch.testing.assert_close(layer.attend(chunk), whole[chunk])


def test_several_spans_are_refused(model: MoETransformer) -> None:
    encoded = encode(6, FULL)
    two = Encoded(encoded.tokens_TD, encoded.cu_tokens, torch.tensor([0, 2, 6]).int(), {}, FULL)
    with pytest.raises(ValueError, match="one span to cut, got 2"):
        LongSequence(model, "fraud", two, 4)
