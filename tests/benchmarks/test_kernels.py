"""The harness that measures the ops: least times, data, verdicts, and a run of tiny shapes."""

import argparse
import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.bench_commands import KERNEL_OPS
from benchmarks import kernel_roofline as roofline
from benchmarks import kernels
from benchmarks.kernel_aims import AIMS, Aim, is_aimed, judge
from benchmarks.kernel_attention_peers import flex_mask
from benchmarks.kernel_measure import (
    ROW_NAMES,
    TIME_OVER,
    aimed_first,
    draw_sets,
    measure_case,
    measure_op,
)
from benchmarks.kernel_moe import MOE, QWEN3, draw_logits
from benchmarks.kernel_moe_peers import padded_places
from benchmarks.kernel_norm import NORM, NormInputs
from benchmarks.kernel_op import OURS, AbsentError, Call, Peer, spread_rows
from benchmarks.kernel_roofline import H200
from benchmarks.kernel_timing import MIN_SAMPLES, Series, alternate, in_turn
from cluster.errors import ConfigurationError
from kernels.attention import FULL, AttentionPattern, visible
from kernels.routing import route

BF16 = torch.bfloat16
FP8_ERROR = 0.3  # of outputs of unit variance: three roundings to 3 bits of each factor


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def moe_us(num_tokens: int, num_active: int) -> float:
    """Return the least time of a layer of Qwen3-30B-A3B."""
    num_rows = num_tokens * QWEN3.num_chosen
    sizes = (QWEN3.width, QWEN3.hidden)
    return roofline.moe_work(num_tokens, num_rows, num_active, sizes, BF16).least_us(H200)


def test_few_tokens_cost_the_weights_of_the_experts_that_were_hit() -> None:
    weights_us = 8 * 3 * 2048 * 768 * 2 / 4.27e6
    assert moe_us(1, 8) == pytest.approx(weights_us, rel=1e-3)
    assert moe_us(1, 8) == pytest.approx(17.7, abs=0.05)
    assert moe_us(64, 64) == pytest.approx(moe_us(64, 128) / 2, rel=0.02)


def test_many_tokens_cost_the_products() -> None:
    assert moe_us(16384, 128) == pytest.approx(6 * 16384 * 8 * 2048 * 768 / 778e6)
    assert moe_us(16384, 128) == pytest.approx(1590, abs=1)


def test_the_norm_costs_four_passes() -> None:
    work = roofline.norm_work(16384, 4096, BF16)
    assert work.num_bytes == 4 * 16384 * 4096 * 2 + 4096 * 2
    assert work.least_us(H200) == pytest.approx(125.7, abs=0.1)


def test_experts_cost_their_weights_tokens_and_hidden_rows() -> None:
    work = roofline.moe_work(5, 8, 2, (16, 4), BF16)
    assert work.num_bytes == 2 * (2 * 3 * 16 * 4 + 2 * 5 * 16 + 2 * 8 * 4)
    assert work.flops == 8 * 3 * 2 * 16 * 4


def test_routing_and_trees_cost_their_arrays() -> None:
    tiles = 2 * 4 // 16 + 1 + 3  # of 16 rows: one that is not full, and one for each expert
    words = 4 * 3 + 3 + 4 * (4 * 2) + 2 * 3 + 2 * tiles
    assert roofline.route_work(4, 3, 2, 16).num_bytes == 4 * words
    trees = 5 * (3 * 9 + 4 * 4 * (1 + 2))
    assert roofline.trees_work(7, 6, 5, 2, 2).num_bytes == 7 * 4 * (6 + 1 + 2) + trees


@pytest.mark.parametrize("length", [0, 1, 3, 10, 33])
@pytest.mark.parametrize(
    "pattern", [FULL, AttentionPattern(8, 3), AttentionPattern(5, 0), AttentionPattern(100, 2)]
)
def test_visible_pairs_are_those_of_the_mask(length: int, pattern: AttentionPattern) -> None:
    position = torch.arange(length)
    assert roofline.visible_pairs(length, pattern) == int(
        visible(position, position, pattern).sum()
    )


def test_a_window_costs_its_pairs() -> None:
    work = roofline.attention_work([65536], AttentionPattern(1024, 64), 16, 128, BF16)
    about = 4 * 16 * 128 * 65536 * (1024 + 2 * 64)
    assert work.flops == pytest.approx(about, rel=0.01)
    assert roofline.attention_work([3, 5], FULL, 2, 16, BF16).flops == 4 * 2 * 16 * (9 + 25)


@pytest.mark.parametrize("pattern", [FULL, AttentionPattern(40, 5)], ids=str)
@pytest.mark.parametrize("lengths", [(200,), (30, 1, 150, 64)], ids=str)
def test_the_mask_of_flex_attention_is_ours(
    lengths: tuple[int, ...], pattern: AttentionPattern
) -> None:
    size = sum(lengths)
    mask = flex_mask(lengths, pattern, torch.device("cpu"))
    everyone, nothing = torch.arange(size), torch.tensor(0)
    seen_TT = mask.mask_mod(nothing, nothing, everyone.unsqueeze(1), everyone.unsqueeze(0))
    own = [visible(torch.arange(n), torch.arange(n), pattern) for n in lengths]
    assert torch.equal(seen_TT, torch.block_diag(*own).bool())


def test_a_dtype_without_a_peak_is_bounded_by_bytes() -> None:
    work = roofline.Work(4.27e6, 1e18, torch.float32)
    assert work.least_us(H200) == pytest.approx(1.0)


@pytest.mark.parametrize(("routing", "power"), [("uniform", 0.0), ("zipf", 1.0)])
def test_experts_are_drawn_by_rank(routing: str, power: float) -> None:
    num_tokens, num_experts = 40_000, 8
    generator = torch.Generator().manual_seed(1)
    logits_TE = draw_logits(num_tokens, num_experts, routing, generator)
    load_E = route(logits_TE, torch.zeros(num_experts), 1).load_E.double()
    share_E = torch.arange(1, num_experts + 1).double() ** -power
    expected_E = num_tokens * share_E / share_E.sum()
    misses_E = (load_E.sort(descending=True).values - expected_E).abs() / expected_E.sqrt()
    assert float(misses_E.max()) < 4.0
    if routing == "zipf":  # the favourite is not always the first
        others = [draw_logits(999, num_experts, routing, generator).mean(dim=0) for _ in range(8)]
        assert len({int(mean_E.argmax()) for mean_E in others}) > 1


def test_drawn_scores_are_chosen_by_their_order() -> None:
    logits_TE = draw_logits(500, 128, "zipf", torch.Generator().manual_seed(2))
    chosen_TK = route(logits_TE, torch.zeros(128), 8).experts_TK
    assert torch.equal(chosen_TK.long(), logits_TE.topk(8, dim=1).indices)


def test_each_set_of_inputs_is_another_and_runs_in_turn() -> None:
    (case,) = NORM.cases("cpu")
    sets = draw_sets(NORM, case, "cpu")
    assert len(sets) >= 3
    assert len({float(inputs.x.sum()) for inputs in sets}) == len(sets)
    assert float(draw_sets(NORM, case, "cpu")[1].x.sum()) == float(sets[1].x.sum())
    seen: list[int] = []
    in_turn([lambda i=i: seen.append(i) for i in range(3)])()  # type: ignore[misc]
    assert seen == [0, 1, 2]


def test_rivals_are_sampled_in_turn() -> None:
    seen: list[str] = []
    series = [Series(lambda name=name: seen.append(name), 1, "cpu") for name in "ab"]  # type: ignore[misc]
    series[1].num_samples = 2
    alternate(series)
    assert "".join(seen) == "ababaaa"


def test_a_case_past_its_time_takes_the_least_number_of_samples() -> None:
    seen: list[str] = []
    series = [Series(lambda name=name: seen.append(name), 1, "cpu") for name in "ab"]  # type: ignore[misc]
    alternate(series, ends_s=0.0)
    assert "".join(seen) == "ab" * MIN_SAMPLES


def test_a_timing_is_the_median_and_the_middle_of_its_samples() -> None:
    series = Series(lambda: None, 1, "cpu", samples_us=[10.0, 9.0, 11.0, 12.0, 50.0, 8.0])
    timing = series.timing()
    assert timing.us == 10.5
    assert timing.spread == pytest.approx((12.0 - 9.0) / 10.5)


def test_checked_rows_reach_both_ends() -> None:
    assert spread_rows(5, 9, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]
    assert spread_rows(9, 3, torch.device("cpu")).tolist() == [0, 4, 8]


def test_padded_rows_belong_to_whole_blocks() -> None:
    place_R, owner_P = padded_places(torch.tensor([3, 0, 2], dtype=torch.int32), 4)
    assert place_R.tolist() == [0, 1, 2, 4, 5]
    assert owner_P.tolist() == [0] * 4 + [2] * 4


def row_of(**fields: object) -> dict[str, Any]:
    """Return one of our rows."""
    return {**dict.fromkeys(ROW_NAMES, ""), "who": OURS, "routing": "-", **fields}


@pytest.mark.parametrize(
    ("graph_us", "verdict"), [(1601.0, "missed"), (1600.0, "met"), (1099.0, "stretch")]
)
def test_a_time_is_judged_by_its_bounds(graph_us: float, verdict: str) -> None:
    row = row_of(op="attention", model="window 1024+64 H16 D128", size=65536, graph_us=graph_us)
    rival = {**row, "who": "FlashAttention-3 window", "graph_us": 1000.0, "eager_us": 1.0}
    by_time, by_peer = judge([row, rival])
    assert by_time["verdict"] == verdict
    assert by_peer["value"] == round(graph_us / 1e3, 3)
    assert by_peer["verdict"] == ("met" if graph_us <= 1250 else "missed")
    assert [each["verdict"] for each in judge([row])] == [verdict, "not measured"]


def test_a_fraction_is_judged_by_its_bounds() -> None:
    rows = [row_of(op="moe", model="qwen3", size=64, fraction=f) for f in (0.74, 0.75, 0.9, "")]
    found = [each["verdict"] for each in judge(rows)]
    assert found == ["missed", "met", "stretch", "not measured"]
    others = [{**rows[0], "who": "liger-kernel"}, {**rows[0], "size": 4096}]
    assert judge(others) == []
    assert str(Aim("moe", "qwen3", (1, 2), "tflops", 500, 600)) == "tflops >= 500, stretch 600"


def test_every_aim_is_measured() -> None:
    """On a GPU; its cases can be listed without one."""
    for aim in AIMS:
        op = kernels.OPS[aim.op]
        cases = [{"op": op.name, "model": c.model, "size": c.size} for c in op.cases("cuda")]
        assert any(aim.holds_for(case) for case in cases), aim
        assert not aim.peer or aim.peer in {peer.name for peer in op.peers}


def test_the_command_line_knows_every_op() -> None:
    assert tuple(kernels.OPS) == KERNEL_OPS


def absent(_: NormInputs) -> Call:
    import_module("no_such_peer")
    raise AssertionError


def unfit(_: NormInputs) -> Call:
    message = "has no window"
    raise AbsentError(message)


def broken(_: NormInputs) -> Call:
    def call() -> Tensor:
        message = "rows: expected a multiple of 128\nand more"
        raise ValueError(message)

    return call


def wrong(inputs: NormInputs) -> Call:
    return lambda: torch.zeros_like(inputs.x)


@pytest.mark.usefixtures("one_thread")
def test_who_cannot_run_says_why_and_disturbs_nobody() -> None:
    strangers = [Peer("absent", absent), Peer("unfit", unfit), Peer("broken", broken)]
    partial = Peer("partial", wrong, does_less="leaves out the sum")
    peers = [*strangers, Peer("wrong", wrong), partial, NORM.peers[0]]
    (case,) = NORM.cases("cpu")
    rows = {row["who"]: row for row in measure_case(NORM, case, peers, "cpu", H200)}
    assert rows["absent"]["note"] == "no_such_peer is not installed"
    assert rows["unfit"]["note"] == "has no window"
    assert rows["broken"]["note"] == "ValueError: rows: expected a multiple of 128"
    assert all(rows[peer.name]["eager_us"] == "" for peer in strangers)
    assert float(rows["wrong"]["max_error"]) > 1.0
    assert (rows["partial"]["max_error"], rows["partial"]["note"]) == ("", "leaves out the sum")
    ours = rows[OURS]
    assert (ours["note"], ours["sets"]) == ("", 3)
    assert float(ours["max_error"]) < 1e-6
    least_us = (4 * 12 + 1) * 32 * 4 / 4.27e6
    assert ours["roofline_us"] == pytest.approx(least_us, abs=1e-3)
    assert ours["fraction"] == pytest.approx(ours["roofline_us"] / ours["eager_us"], abs=1e-4)


def test_data_that_cannot_be_drawn_is_in_the_rows_of_all() -> None:
    def draw(_: torch.Generator) -> NormInputs:
        message = "out of memory"
        raise MemoryError(message)

    (case,) = NORM.cases("cpu")
    rows = measure_case(NORM, replace(case, draw=draw), NORM.peers, "cpu", None)
    assert [row["who"] for row in rows] == [peer.name for peer in NORM.peers]
    assert {row["note"] for row in rows} == {"MemoryError: out of memory"}


def test_what_is_not_begun_in_time_is_said() -> None:
    for is_compiled in (False, True):
        rows = list(measure_op(MOE, "cpu", seconds=0.0, is_compiled=is_compiled))
        assert len(rows) == len(MOE.cases("cpu")) * len(MOE.rivals(is_compiled=is_compiled))
        assert {row["note"] for row in rows} == {TIME_OVER}


def test_cases_that_an_aim_speaks_of_come_first() -> None:
    backwards = replace(NORM, cases=lambda device: NORM.cases(device)[::-1])
    cases = aimed_first(backwards, "cuda")
    assert [is_aimed("norm", case.model, case.size) for case in cases] == [
        True,
        False,
        False,
        False,
    ]
    assert {case.model for case in cases} == {case.model for case in NORM.cases("cuda")}


def arguments(folder: Path, **changed: object) -> argparse.Namespace:
    given = {"op": None, "device": "cpu", "seconds": 60.0, "results": folder}
    return argparse.Namespace(**{**given, "json": folder / "figures.json", **changed})


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_run_measures_everyone_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(arguments(tmp_path)) == 0
    (results,) = tmp_path.glob("kernels_*.csv")
    rows = list(csv.DictReader(results.read_text().splitlines()))
    expected = [
        (op.name, case.model, case.routing, peer.name)
        for op in kernels.OPS.values()
        for case in op.cases("cpu")
        for peer in op.peers
    ]
    found = [(row["op"], row["model"], row["routing"], row["who"]) for row in rows]
    assert sorted(found) == sorted(expected)
    for row in rows:
        assert set(ROW_NAMES) <= set(row)
        if row["who"].startswith(OURS) or row["who"] == "torch eager":
            is_quantised = row["op"] == "moe_fp8" and row["who"] == OURS
            assert float(row["max_error"]) < (FP8_ERROR if is_quantised else 1e-5), row
            assert float(row["eager_us"]) > 0
        assert row["eager_us"] or row["note"], row
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows) + 1  # no aim holds for tiny shapes
    assert json.loads(lines[-1])["rows"] == len(rows)
    assert len(json.loads((tmp_path / "figures.json").read_text())["rows"]) == len(rows)


def test_one_op_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(arguments(tmp_path, op=["norm"], seconds=0.0, json=None)) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["ops"], figures["rows"]) == (["norm"], len(NORM.peers))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing")
def test_a_missing_gpu_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="found none"):
        kernels.main(arguments(tmp_path, device="cuda"))


@pytest.mark.slow
def test_an_op_in_a_process_of_its_own_gives_its_rows() -> None:
    rows = list(kernels.run_apart("norm", "cpu", 60.0, is_compiled=False))
    assert [row["who"] for row in rows] == [peer.name for peer in NORM.rivals(is_compiled=False)]
    assert tuple(rows[0]) == ROW_NAMES


@pytest.mark.slow
def test_a_process_that_dies_is_a_row() -> None:
    (row,) = kernels.run_apart("no_such_op", "cpu", 60.0, is_compiled=False)
    assert (row["op"], row["note"]) == ("no_such_op", "its process ended with 1")


@pytest.mark.slow
def test_a_process_beyond_its_time_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "GRACE_S", 0.1)  # it has not even imported torch by then
    (row,) = kernels.run_apart("norm", "cpu", 0.1, is_compiled=False)
    assert row["note"] == "stopped after 0 s"
