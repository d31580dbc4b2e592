"""Blocks by low-rank projections, without experts and with experts in groups, at a tiny size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core_model.balance import expert_load, rebalance, utilisation
from core_model.blocks import LowRankAttention, rotate, span_positions
from core_model.checkpoint import load_checkpoint, save_checkpoint
from core_model.chunks import LongSequence
from core_model.config import PRESETS
from core_model.graphs import Slots
from core_model.model import MoETransformer
from core_model.packing import Encoded, SpanGroup, offsets_from_lengths
from kernels.attention import FULL, AttentionPattern

TINY = replace(  # what deepseek-v3 has, in small, no two sizes alike
    PRESETS["tiny"],
    num_layers=3,
    num_experts=8,
    num_chosen=3,
    num_groups=4,
    chosen_groups=2,
    routed_scale=2.5,
    dense_layers=1,
    d_dense=48,
    q_rank=12,
    kv_rank=10,
    d_nope=6,
    d_rope=4,
    d_value=5,
)
LENGTHS = (5, 1, 9)


@pytest.fixture
def model() -> MoETransformer:
    torch.manual_seed(0)
    return MoETransformer(TINY, []).eval()


def spans(*lengths: int, pattern: AttentionPattern = FULL) -> SpanGroup:
    return SpanGroup(sum(lengths), offsets_from_lengths(torch.tensor(lengths)), pattern)


def draw(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, TINY.d_model, generator=torch.Generator().manual_seed(1))


def unit(x_TD: Tensor) -> Tensor:
    return x_TD * torch.rsqrt(x_TD.square().mean(dim=1, keepdim=True) + TINY.rms_eps)


def turned(x_r: Tensor, position: int) -> Tensor:
    """The rotary part by complex numbers."""
    half = x_r.numel() // 2
    angle = position * 10_000.0 ** (-torch.arange(half) / half)
    turned_h = torch.complex(x_r[:half], x_r[half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([turned_h.real, turned_h.imag])


def test_low_rank_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    layer = LowRankAttention(TINY)
    nn.init.uniform_(layer.q_norm)
    nn.init.uniform_(layer.kv_norm)
    x_TD, num_tokens = draw(5), 5
    with torch.no_grad():
        q_HTd = (unit(x_TD @ layer.q_down.T) * layer.q_norm @ layer.q_up.T).view(num_tokens, 2, 10)
        kv_HTd = unit(x_TD @ layer.kv_down.T) * layer.kv_norm @ layer.kv_up.T
        kv_HTd = kv_HTd.view(num_tokens, 2, 11)
        rope_Tr = x_TD @ layer.k_rope.T
        heads = []
        for h in range(2):
            queries = [torch.cat([q[:6], turned(q[6:], t)]) for t, q in enumerate(q_HTd[:, h])]
            keys = [torch.cat([kv[:6], turned(rope_Tr[t], t)]) for t, kv in enumerate(kv_HTd[:, h])]
            scores_TT = torch.stack(queries) @ torch.stack(keys).T / 10**0.5
            heads.append(scores_TT.softmax(dim=1) @ kv_HTd[:, h, 6:])
        expected_TD = torch.cat(heads, dim=1) @ layer.out.T
        got_TD = layer(x_TD, [spans(num_tokens)])
    torch.testing.assert_close(got_TD, expected_TD, atol=1e-5, rtol=1e-5)


def test_only_the_distance_of_positions_matters() -> None:
    torch.manual_seed(0)
    layer, x_TD = LowRankAttention(TINY), draw(7)
    position_T = torch.arange(7)
    with torch.no_grad():
        q_THd, k_THd, _ = layer.project(x_TD, position_T).unbind(1)
        moved_q, moved_k, _ = layer.project(x_TD, position_T + 1000).unbind(1)
        apart_q, apart_k, _ = layer.project(x_TD, 2 * position_T).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q_THd, k_THd)
    moved = torch.einsum("qhd,khd->hqk", moved_q, moved_k)
    torch.testing.assert_close(moved, scores, atol=1e-3, rtol=1e-3)  # float32 angles of 1000
    assert not torch.allclose(moved_q, q_THd, atol=0.1)
    assert not torch.allclose(torch.einsum("qhd,khd->hqk", apart_q, apart_k), scores, atol=0.1)


def test_a_turned_row_keeps_its_length() -> None:
    x_THr = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0))
    turned_THr = rotate(x_THr, torch.arange(6))
    torch.testing.assert_close(turned_THr.norm(dim=2), x_THr.norm(dim=2))
    assert torch.equal(turned_THr[0], x_THr[0])


def test_positions_count_from_the_start_of_each_span() -> None:
    assert span_positions(spans(2, 0, 3, 1)).tolist() == [0, 1, 0, 1, 2, 0]


@torch.inference_mode()
def test_order_matters_only_with_positions(model: MoETransformer) -> None:
    plain = MoETransformer(PRESETS["tiny"], []).eval()
    x_TD, swapped = draw(6), torch.tensor([0, 4, 2, 3, 1, 5])
    for each, knows_order in ((model, True), (plain, False)):
        tokens_TD, _ = each.run_blocks(x_TD, [spans(6)])
        again_TD, _ = each.run_blocks(x_TD[swapped], [spans(6)])
        is_same = torch.allclose(again_TD[swapped], tokens_TD, atol=1e-4)
        assert is_same != knows_order


@torch.inference_mode()
def test_spans_of_one_step_answer_as_alone(model: MoETransformer) -> None:
    x_TD = draw(sum(LENGTHS))
    window = AttentionPattern(4, 1)
    groups = [spans(*LENGTHS[:2]), spans(LENGTHS[2], pattern=window)]
    tokens_TD, experts_LTK = model.run_blocks(x_TD, groups)
    alone = [
        model.run_blocks(part, [spans(len(part), pattern=pattern)])
        for part, pattern in zip(x_TD.split(LENGTHS), (FULL, FULL, window), strict=True)
    ]
    expected_TD = torch.cat([tokens for tokens, _ in alone])
    torch.testing.assert_close(tokens_TD, expected_TD, atol=2e-5, rtol=2e-5)
    assert torch.equal(experts_LTK, torch.cat([experts for _, experts in alone], dim=1))


@torch.inference_mode()
def test_experts_are_named_where_there_are_any(model: MoETransformer) -> None:
    _, experts_LTK = model.run_blocks(draw(40), [spans(40)])
    assert experts_LTK.shape == (2, 40, 3)
    groups_LTK = experts_LTK // 2
    assert max(len(set(row)) for row in groups_LTK.flatten(0, 1).tolist()) == 2
    assert len(model.moe_layers) == TINY.num_moe_layers == 2


def test_every_parameter_learns(model: MoETransformer) -> None:
    tokens_TD, _ = model.run_blocks(draw(60), [spans(40, 20)])
    tokens_TD.square().mul(torch.linspace(0.5, 1.5, TINY.d_model)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0.0, name
        assert bool(parameter.grad.isfinite().all()), name


@torch.inference_mode()
def test_the_scale_multiplies_what_the_routed_experts_give(model: MoETransformer) -> None:
    layer, x_TD = model.moe_layers[0], draw(8)
    scaled_TD, _ = layer(x_TD)
    layer.routed_scale = 0.0
    shared_TD, _ = layer(x_TD)
    layer.routed_scale = 1.0
    whole_TD, _ = layer(x_TD)
    torch.testing.assert_close(scaled_TD - shared_TD, 2.5 * (whole_TD - shared_TD))


@pytest.mark.parametrize("pattern", [FULL, AttentionPattern(window=8, num_global=2)], ids=str)
@torch.inference_mode()
def test_chunks_give_what_the_whole_gives(pattern: AttentionPattern) -> None:
    model = MoETransformer(TINY, ["fraud"]).eval()
    whole = spans(50, pattern=pattern)
    encoded = Encoded(draw(50), whole.cu_spans, whole.cu_spans, {}, pattern)
    expected_TD, experts_LTK = model.run_blocks(encoded.tokens_TD, [whole])
    long = LongSequence(model, "fraud", encoded, 16)
    while not long.is_done:
        long.advance()
    torch.testing.assert_close(long.tokens_TD, expected_TD, atol=2e-5, rtol=1e-4)
    assert torch.equal(long.experts_LTK, experts_LTK)


@torch.inference_mode()
def test_idle_tokens_change_nothing(model: MoETransformer) -> None:
    tokens_TD, group = draw(sum(LENGTHS)), spans(*LENGTHS)
    slots = Slots.of(32, tokens_TD)
    slots.tokens_WD.fill_(7.0)
    slots.fill(tokens_TD, group.cu_spans)
    wide_WD, _ = model.run_blocks(slots.tokens_WD, [slots.group(FULL)], 0, slots.num_valid)
    alone_TD, _ = model.run_blocks(tokens_TD, [group])
    torch.testing.assert_close(wide_WD[: group.num_tokens], alone_TD, atol=2e-5, rtol=1e-4)


def test_a_checkpoint_brings_it_back(model: MoETransformer, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, model, version="v-1", data="none", metrics={}, command="none")
    loaded, _ = load_checkpoint(tmp_path)
    assert loaded.config == TINY
    stored = loaded.state_dict()
    assert all(
        torch.equal(stored[name], tensor.half().float())
        for name, tensor in model.state_dict().items()
    )


@torch.inference_mode()
def test_rebalancing_levels_experts_in_groups() -> None:
    model = MoETransformer(TINY, ["fraud"]).eval()
    for layer in model.moe_layers:
        layer.expert_bias[:, 0] += 1.0
    tokens_TD, group, task = draw(1500), spans(*[3] * 500), "fraud"

    def level() -> float:
        _, experts_LTK = model.run_blocks(tokens_TD, [group])
        return float(utilisation(expert_load(experts_LTK, TINY.num_experts)).min())

    assert level() < 0.5
    rebalance(model, task, [Encoded(tokens_TD, group.cu_spans, group.cu_spans, {})])
    assert level() > 0.95
