"""Several tasks in the same steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import core_model.joint
from benchmarks.workload import TOKENS
from core_model.builtin_tasks import FRAUD
from core_model.config import PRESETS
from core_model.joint import LoopSettings, WeightAverage, epochs_of, train
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.training import SampleSource, WeightedSample, predict

MakeBatch = Callable[..., RaggedBatch]
SETTINGS = LoopSettings(steps=30, peak_lr=5e-3)


def tokens_batch() -> RaggedBatch:
    rows = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    return RaggedBatch(rows, torch.arange(0, 601, 3, dtype=torch.int32), {})


def source(task: str, batch: RaggedBatch, target_B: Tensor) -> SampleSource:
    def loss(outputs: Tensor, chosen: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], target_B[chosen])

    sample = WeightedSample(task, batch, torch.ones(batch.num_sequences))
    return SampleSource(sample, loss, batch_size=50, seed=0, peak_lr=5e-3, weight_decay=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of several threads end in the order in which they come: not the same bits each time."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture
def sources(make_batch: MakeBatch) -> list[SampleSource]:
    tokens, fraud = tokens_batch(), make_batch([2] * 200)
    return [
        source(FRAUD.name, fraud, (fraud.extras["context"][:, 0] > 0).float()),
        source(TOKENS.name, tokens, (tokens.features[::3, 0] > 0).float()),
    ]


def fresh() -> MoETransformer:
    torch.manual_seed(0)
    return MoETransformer(PRESETS["tiny"], [FRAUD.name, TOKENS.name])


def nothing(*_: object) -> None:
    pass


@pytest.fixture
def trained(sources: list[SampleSource]) -> MoETransformer:
    model = fresh()
    train(model, sources, SETTINGS, nothing)
    return model


@pytest.mark.slow
def test_one_block_stack_learns_both_tasks(sources: list[SampleSource]) -> None:
    said: list[Mapping[str, float]] = []
    model = fresh()
    train(model, sources, LoopSettings(steps=80, peak_lr=5e-3), lambda _s, _n, x: said.append(x))
    for each in sources:
        assert said[-1][each.task] < 0.8 * said[0][each.task]
    stack = [*model.blocks.parameters(), model.final_norm]
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert all(p.grad is not None for p in stack)


def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    sources: list[SampleSource],
    trained: MoETransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core_model.joint, "SAVE_EVERY", 7)
    keep = tmp_path / "state.pt"

    def cut(step: int, *_: object) -> None:
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fresh(), sources, SETTINGS, cut, keep)
    torch.manual_seed(1)  # whatever the next process starts with
    again = MoETransformer(PRESETS["tiny"], [FRAUD.name, TOKENS.name])
    steps: list[int] = []
    train(again, sources, SETTINGS, lambda step, *_: steps.append(step), keep)
    assert steps == [20]  # from 14 on
    expected = trained.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in again.state_dict().items())


def test_the_state_of_another_run_is_refused(
    sources: list[SampleSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_model.joint, "SAVE_EVERY", 1)
    keep = tmp_path / "state.pt"
    train(fresh(), sources, LoopSettings(steps=2), nothing, keep)
    with pytest.raises(ValueError, match=r"state\.pt: expected the state of this run"):
        train(fresh(), sources, LoopSettings(steps=3), nothing, keep)


def gradients(
    sources: Sequence[SampleSource], losses: Mapping[str, float], *, is_scaled: bool
) -> dict[str, Tensor]:
    """Return the gradient of each parameter, each task's loss times a factor."""
    model = fresh()
    pulls = core_model.joint._Pulls(sources if is_scaled else [])
    draws = {each.task: next(iter(each.draws(0))) for each in sources}
    step = model.encode_and_run({task: draw.batch for task, draw in draws.items()})
    total = torch.zeros(())
    for task, draw in draws.items():
        encoded, piece = step.encoded[task], step.pieces[task]
        pulls.watch(task, encoded.tokens_TD, piece)
        total = total + losses[task] * draw.loss(model.heads[task], piece, encoded)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_unit_of_a_loss_does_not_change_its_pull_on_the_blocks(
    sources: list[SampleSource],
) -> None:
    plain = gradients(sources, {FRAUD.name: 1.0, TOKENS.name: 1.0}, is_scaled=True)
    scaled = gradients(sources, {FRAUD.name: 1000.0, TOKENS.name: 0.01}, is_scaled=True)
    names = [name for name in plain if name.startswith("blocks")]
    assert names
    for name in names:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-3, atol=1e-6)


def test_adapters_and_heads_see_the_loss_as_it_is(sources: list[SampleSource]) -> None:
    losses = {FRAUD.name: 3.0, TOKENS.name: 0.1}
    scaled = gradients(sources, losses, is_scaled=True)
    plain = gradients(sources, losses, is_scaled=False)
    names = [name for name in plain if name.startswith(("adapters", "heads"))]
    assert {name.split(".")[1] for name in names} == set(losses)
    for name in names:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_what_a_step_draws_depends_on_its_number_alone(start: int) -> None:
    def draws(first: int) -> list[list[int]]:
        steps = epochs_of(10, 3, 5, first, torch.device("cpu"))
        return [next(steps).tolist() for _ in range(12 - first)]

    whole = draws(0)
    assert draws(start) == whole[start:]
    assert all(len(each) == 3 for each in whole)
    for epoch in range(0, 12, 3):
        assert len({*whole[epoch], *whole[epoch + 1], *whole[epoch + 2]}) == 9


def test_a_step_counts_every_task_alike_in_the_load(
    sources: list[SampleSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(core_model.joint, "move_bias", lambda *given: seen.append(given[2]))
    train(fresh(), sources, LoopSettings(steps=1), nothing)
    sums = [load_LE.sum(dim=1).tolist() for load_LE in seen]
    assert sums == [pytest.approx([2.0, 2.0])] * 2  # two experts for each token of a task


def test_an_average_weighs_the_past_by_its_decay() -> None:
    layer = nn.Linear(1, 1, bias=False)
    average = WeightAverage(layer, 0.5)
    for value in (1.0, 3.0):
        nn.init.constant_(layer.weight, value)
        average.update()
    average.install()
    assert layer.weight.item() == pytest.approx((0.25 * 1.0 + 0.5 * 3.0) / 0.75)


def test_a_mixed_model_answers_each_task_as_alone(
    sources: list[SampleSource], trained: MoETransformer
) -> None:
    trained.eval()
    batches = {each.task: each.sample.batch for each in sources}
    with torch.no_grad():
        mixed = trained(batches)
    for task, batch in batches.items():
        alone, _ = predict(trained, task, batch)
        torch.testing.assert_close(mixed.outputs[task][0], alone, atol=2e-5, rtol=2e-5)
