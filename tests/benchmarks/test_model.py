"""What the comparison of shared and separate cores computes from its runs."""

from typing import TYPE_CHECKING, cast
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from apps.joint import Plan
from benchmarks.experts_figure import draw_shares
from benchmarks.kernel_step_inputs import dense_of
from benchmarks.model import as_text, summary
from benchmarks.model_balance import NUM_KINDS, Mix, Routed, kinds_of
from benchmarks.model_layer import least_seconds
from benchmarks.model_parts import Lessons, parts_of
from core_model.config import PRESETS
from core_model.joint import LoopSettings
from core_model.size import count_parameters

if TYPE_CHECKING:
    from apps.joint import Lesson

TINY = PRESETS["tiny"]  # two layers, four experts, two of them chosen


def alike(chosen: np.ndarray) -> Routed:
    """Return tokens of one kind."""
    return Routed(chosen, np.zeros(chosen.shape[1], np.uint8))


def routed(weights: tuple[float, ...], num: int, seed: int) -> Routed:
    """Return tokens with two different experts each, drawn unevenly, [2, T, 2]."""
    rng = np.random.default_rng(seed)
    keys = rng.gumbel(size=(2, num, 4)) + np.log(np.array(weights))
    return alike(np.argsort(-keys, axis=2)[:, :, :2].astype(np.uint8))


def test_every_task_has_the_same_share_of_the_mix() -> None:
    one, other = np.zeros((2, 100, 2), np.uint8), np.zeros((2, 1000, 2), np.uint8)
    one[:, :, 1], other[:, :, 0], other[:, :, 1] = 1, 2, 3
    figures = Mix({"a": alike(one), "b": alike(other)}, TINY).figures(0)
    assert figures["utilisation"] == [1.0, 1.0]  # unlike that of the 1,100 tokens
    assert figures["by_task"]["a"] == {"mean": 0.5, "worst_layer": 0.5, "dead": 4}
    assert figures["tokens"] == {"a": 100, "b": 1000}
    assert figures["step"]["mean"] == 1.0


def test_random_routing_is_as_even_in_steps_as_it_is_said_to_be() -> None:
    chosen = {name: routed((1.0,) * 4, 20_000, seed) for seed, name in enumerate("abc")}
    figures = Mix(chosen, TINY).figures(0)
    assert figures["step"]["mean"] == pytest.approx(figures["step_of_random_routing"], abs=0.01)
    assert figures["mean"] > 0.98


def test_uneven_routing_shows() -> None:
    figures = Mix({"a": routed((4.0, 1.0, 1.0, 1.0), 5000, 0)}, TINY).figures(0)
    assert figures["mean"] < 0.7
    assert figures["step"]["mean"] < figures["step_of_random_routing"] - 0.2


def test_shares_of_a_kind_are_of_its_tokens_alone() -> None:
    chosen = np.zeros((2, 10, 2), np.uint8)
    chosen[:, :, 1], chosen[:, 6:, 0], chosen[:, 6:, 1] = 1, 2, 3
    kind = np.array([0] * 6 + [1] * 4, np.uint8)
    shares = Mix({"a": Routed(chosen, kind)}, TINY).figures(0)["shares"]
    assert shares["a"] == [[0.3, 0.3, 0.2, 0.2]] * 2
    assert shares["a, kind 1"] == [[0.5, 0.5, 0.0, 0.0]] * 2
    assert shares["a, kind 2"] == [[0.0, 0.0, 0.5, 0.5]] * 2


def test_like_tokens_are_of_one_kind_and_the_largest_comes_first() -> None:
    rng, sizes = np.random.default_rng(0), (300, 50, 150)
    kind = np.repeat(range(NUM_KINDS), sizes)
    tokens = rng.normal(size=(500, 8)) * 0.1 + 5.0 * np.eye(8)[kind]
    assert (kinds_of(tokens.astype(np.float16)) == np.array([0, 2, 1])[kind]).all()


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_the_dense_core_is_as_large_as_what_is_at_work(preset: str) -> None:
    config = PRESETS[preset]
    active, dense = count_parameters(config).active, count_parameters(dense_of(config))
    routers = config.num_layers * config.num_experts * config.d_model
    assert dense.total == dense.active
    assert active - dense.active == routers - config.num_layers * config.d_model


class Named:
    """Stands for a lesson where only its task matters."""

    def __init__(self, task: str) -> None:
        self.task = task


def test_every_kind_of_core_is_trained_for_every_seed() -> None:
    whole = [cast("Lesson", Named(task)) for task in ("t", "u")]
    plan = Plan(TINY, LoopSettings(steps=10), 0, "cpu")
    parts = parts_of(Lessons(whole, {"local": whole, "global": whole}), plan, 2)
    names = {"shared", "separate-t", "separate-u", "dense", "lean-local", "lean-global"}
    expected = {f"{name}-{seed}" for name in names for seed in (0, 1)}
    assert {part.key for part in parts} == expected | {"loss-0", "unbalanced-0"}
    by_key = {part.key: part for part in parts}
    assert by_key["separate-u-1"].tasks == ("u",)
    assert by_key["separate-u-1"].plan.config == by_key["shared-0"].plan.config  # of the same size
    assert by_key["loss-0"].plan.settings.balance_loss > 0.0
    assert by_key["unbalanced-0"].plan.settings.bias_rate == 0.0


def test_few_tokens_cost_the_reading_of_weights_and_many_the_products() -> None:
    config = PRESETS["deepseek-v3"]
    read = 2 * 3 * 7168 * 2048 * (8 + 1) / 4.27e12
    assert least_seconds(config, 1, 8) == pytest.approx(read, rel=0.01)
    flops = 2 * 65536 * 9 * 3 * 7168 * 2048 / 778e12
    assert least_seconds(config, 65536, 256) == pytest.approx(flops, rel=0.01)


def figures_of(value: float) -> dict[str, object]:
    balance = Mix({"t": routed((1.0,) * 4, 3000, 0)}, TINY).figures(0)
    metrics = {"t": {"ap": value}, "u": {"auc": 2 * value}}
    return {"metrics": metrics, "balance": balance}


def test_the_table_compares_with_each_task_trained_alone() -> None:
    found = {
        f"{name}-{s}": figures_of(0.4 + 0.1 * s)
        for name in ("shared", "dense", "lean-local")
        for s in (0, 1)
    }
    found |= {f"separate-{t}-{s}": figures_of(0.5) for t in "tu" for s in (0, 1)}
    found |= {"loss-0": figures_of(0.1), "unbalanced-0": figures_of(0.1)}
    figures = summary(found, ["t", "u"], 2)
    assert list(figures["metrics"]) == ["shared", "separate", "dense", "lean-local"]
    assert figures["metrics"]["shared"]["t_ap"] == pytest.approx({"mean": 0.45, "std": 0.05})
    text = as_text({**figures, "stack": {"shared": 10, "separate": 20}})
    assert "0.9000" in text.splitlines()[1]  # .45 / .5


def test_the_figure_is_a_picture_with_a_cell_for_each_expert() -> None:
    shares = {"a & b": np.full((2, 4), 0.25), "c": np.eye(4)[:2]}
    root = ET.fromstring(draw_shares(shares))
    rects = root.findall("{http://www.w3.org/2000/svg}rect")
    assert len(rects) == 1 + 2 * 2 * 4
    assert len({rect.get("fill") for rect in rects}) == 4  # white paper; even, none, all
