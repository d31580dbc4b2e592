"""A step in a wider bucket gives what it gives alone; the graphs themselves need a GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from core_model.config import PRESETS
from core_model.graphs import BUCKETS, BlockGraphs, Slots, captured_blocks
from core_model.model import MoETransformer
from core_model.packing import SpanGroup, merge_groups, offsets_from_lengths
from kernels.attention import FULL, AttentionPattern
from kernels.dispatch import VARIABLE, environment_impl, select_impl


def step(num_spans: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and offsets of spans of one and two tokens, as fraud has them."""
    lengths = torch.tensor([1, 2] * num_spans)[:num_spans]
    cu_spans = offsets_from_lengths(lengths).to(device)
    generator = torch.Generator().manual_seed(num_spans)
    tokens = torch.randn(int(lengths.sum()), PRESETS["base"].d_model, generator=generator)
    return tokens.to(device), cu_spans


@pytest.mark.parametrize("num_spans", [1, 7, 42])
@torch.inference_mode()
def test_idle_tokens_change_nothing(num_spans: int) -> None:
    torch.manual_seed(0)
    model = MoETransformer(PRESETS["base"], ["fraud", "rul"]).eval()
    model.moe_layers[0].expert_bias[:] = torch.randn(2, model.config.num_experts)
    tokens_TD, cu_spans = step(num_spans)
    owner_T = torch.arange(len(tokens_TD), dtype=torch.int32) % 2
    slots = Slots.of(64, tokens_TD)
    slots.tokens_WD.fill_(7.0)  # left from another step
    slots.fill(tokens_TD, cu_spans, owner_T)
    num_tokens = tokens_TD.shape[0]
    wide_WD, experts_LWK = model.run_blocks(
        slots.tokens_WD, [slots.group(FULL)], slots.owner_W, slots.num_valid
    )
    group = SpanGroup(num_tokens, cu_spans, FULL)
    alone_TD, experts_LTK = model.run_blocks(tokens_TD, [group], owner_T)
    torch.testing.assert_close(wide_WD[:num_tokens], alone_TD, rtol=1e-4, atol=1e-5)
    assert torch.equal(experts_LWK[:, :num_tokens], experts_LTK)
    assert torch.isfinite(wide_WD).all()


@torch.inference_mode()
def test_short_spans_join_a_window_and_get_what_they_would_alone() -> None:
    """One attention call, and one graph, for a step of tasks with different patterns."""
    torch.manual_seed(0)
    model = MoETransformer(PRESETS["tiny"], ["fraud"]).eval()
    window = AttentionPattern(window=6, num_global=1)
    width = model.config.d_model

    def group(lengths: list[int], pattern: AttentionPattern, longest: int | None) -> SpanGroup:
        cu_spans = offsets_from_lengths(torch.tensor(lengths))
        return SpanGroup(sum(lengths), cu_spans, pattern, longest)

    short, long = group([1, 2] * 3, FULL, 2), group([3, 4, 9], window, None)
    for groups in ([short, long], [long, short], [short, long, short]):
        (joined,) = merge_groups(groups)
        assert joined.pattern == window
        assert joined.num_tokens == sum(each.num_tokens for each in groups)
        tokens_TD = torch.randn(joined.num_tokens, width)
        torch.testing.assert_close(
            model.run_blocks(tokens_TD, [joined])[0], model.run_blocks(tokens_TD, groups)[0]
        )


def test_spans_that_a_window_would_cut_stay_apart() -> None:
    """Only a known bound may join them."""
    window = AttentionPattern(window=6, num_global=1)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    for longest in (None, 5):
        groups = [SpanGroup(5, offsets, FULL, longest), SpanGroup(5, offsets, window)]
        assert len(merge_groups(groups)) == 2
    known = [SpanGroup(5, offsets, FULL, 4), SpanGroup(5, offsets, window, 5)]
    (joined,) = merge_groups(known)
    assert joined.longest_span == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", [FULL, AttentionPattern(8, 1)])
@torch.inference_mode()
def test_replays_equal_the_eager_blocks_and_what_does_not_fit_runs_eagerly(
    pattern: AttentionPattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = MoETransformer(PRESETS["base"], ["fraud", "rul"]).eval().cuda()
    model.moe_layers[0].expert_bias[:] = torch.randn(2, model.config.num_experts)
    monkeypatch.setattr(model.adapters["fraud"], "pattern", pattern, raising=False)
    graphs = BlockGraphs(model)
    graphs.capture()
    for num_spans in (1, 42, 43, 333, 1000, BUCKETS[-1]):
        tokens_TD, cu_spans = step(num_spans, "cuda")
        groups = [SpanGroup(tokens_TD.shape[0], cu_spans, pattern)]
        owner_T = torch.arange(len(tokens_TD), dtype=torch.int32, device="cuda") % 2
        got_TD, got_LTK = graphs.run(tokens_TD, groups, owner_T)
        want_TD, want_LTK = model.run_blocks(tokens_TD, groups, owner_T)
        torch.testing.assert_close(got_TD, want_TD, rtol=1e-3, atol=1e-4)
        assert (got_LTK != want_LTK).float().mean() < 1e-3  # near ties may flip
    tokens_TD, cu_spans = step(43, "cuda")
    windowed = [SpanGroup(tokens_TD.shape[0], cu_spans, AttentionPattern(64))]
    torch.testing.assert_close(
        graphs.run(tokens_TD, windowed)[0], model.run_blocks(tokens_TD, windowed)[0]
    )


@torch.inference_mode()
def test_narrowed_blocks_keep_routers_adapters_and_heads_wide() -> None:
    model = MoETransformer(PRESETS["tiny"], ["fraud"]).narrow_blocks(torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    narrow = {name for name, kind in kinds.items() if kind is torch.bfloat16}
    assert "final_norm" in narrow
    assert "blocks.0.moe.gate_up" in narrow
    assert "blocks.0.attention.qkv" in narrow
    assert not {n for n in narrow if "router" in n or n.startswith(("adapters", "heads"))}
    tokens_TD = torch.randn(5, model.config.d_model)
    groups = [SpanGroup(5, torch.tensor([0, 2, 5], dtype=torch.int32), FULL)]
    narrow_TD, _ = model.run_blocks(tokens_TD.bfloat16(), groups)
    assert narrow_TD.dtype is torch.bfloat16


@pytest.fixture
def _environment_is_read_anew() -> Iterator[None]:
    environment_impl.cache_clear()
    yield
    environment_impl.cache_clear()


@pytest.mark.usefixtures("_environment_is_read_anew")
def test_the_environment_takes_triton_and_the_graphs_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MoETransformer(PRESETS["tiny"], ["fraud"]).eval()
    with FakeTensorMode():
        on_cuda = torch.empty(1, device="cuda")
    assert select_impl("auto", on_cuda) == "triton"
    monkeypatch.setenv(VARIABLE, "torch")
    assert select_impl("auto", on_cuda) == "triton"  # it is read once
    environment_impl.cache_clear()
    assert select_impl("auto", on_cuda) == "torch"
    assert select_impl("triton", on_cuda) == "triton"
    assert captured_blocks(model) is None


@pytest.mark.usefixtures("_environment_is_read_anew")
@pytest.mark.parametrize("value", ["triton", "Torch", ""])
def test_an_unknown_word_in_the_environment_is_one_line(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=f"TRIMOE_KERNELS: expected auto or torch, got '{value}'"):
        environment_impl()
