from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.fraud.chaining import EASY_SHARE, GAP_DAYS, plan
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.train import Dataset, Examples, Fit, fit_model
from core_model.training import TrainSettings

pytestmark = pytest.mark.slow
DAYS = 60
CONFIG = SimulationConfig(
    num_cards=120,
    num_terminals=80,
    num_days=DAYS,
    radius=20.0,
    terminals_per_day=4.0,
    cards_per_day=0.5,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products gain nothing from a second thread and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(simulate(CONFIG), tmp_path_factory.mktemp("trees"), threads=1)


@pytest.fixture(scope="module")
def examples(dataset: Dataset) -> Examples:
    start = dataset.ledger.first_day
    return dataset.training_examples(start, start + DAYS, seed=0)


def test_no_row_shows_an_answer_of_trees_that_could_know_it(
    dataset: Dataset, examples: Examples
) -> None:
    start = dataset.ledger.first_day
    links = plan(start, start + DAYS)
    day = dataset.ledger.day[examples.rows]
    shown = ~np.isnan(examples.tree[:, 0])
    assert np.array_equal(shown, day >= links[0].first)
    assert len(links) > 1
    for link in links:
        scored = (day >= link.first) & (day < link.last)
        fitted = (dataset.ledger.day >= link.start) & (dataset.ledger.day < link.fit_end)
        assert scored.any()
        assert day[scored].min() - dataset.ledger.day[fitted].max() > GAP_DAYS
        ensemble = dataset.ensemble(link.start, link.fit_end)
        expected = dataset.tree_answers(ensemble, examples.rows[scored])
        np.testing.assert_array_equal(examples.tree[scored], expected)


def test_trees_of_a_link_do_not_depend_on_later_labels(dataset: Dataset, tmp_path: Path) -> None:
    link = plan(dataset.ledger.first_day, dataset.ledger.first_day + DAYS)[0]
    table = simulate(CONFIG)
    later = table["time_ms"].to_numpy() // 86_400_000 >= link.fit_end
    table.loc[later, "TX_FRAUD"] = 1 - table.loc[later, "TX_FRAUD"]
    other = Dataset(table, tmp_path, threads=1).ensemble(link.start, link.fit_end)
    for got, expected in zip(other, dataset.ensemble(link.start, link.fit_end), strict=True):
        assert torch.equal(got, expected)


def test_weights_stand_for_the_traffic(dataset: Dataset, examples: Examples) -> None:
    start = dataset.ledger.first_day
    num_rows, num_frauds = dataset.ledger.day.size, int(dataset.ledger.fraud.sum())
    assert np.unique(examples.weight).tolist() == pytest.approx([1.0, 1 / EASY_SHARE])
    totals = []
    for seed in range(6):
        drawn = dataset.training_examples(start, start + DAYS, seed) if seed else examples
        assert np.unique(drawn.rows).size == drawn.rows.size < num_rows
        assert int(drawn.fraud.sum()) == num_frauds
        assert drawn.weight[drawn.fraud == 1].tolist() == [1.0] * num_frauds
        totals.append(float(drawn.weight.sum()))
    deviation = np.sqrt(num_rows * (1 / EASY_SHARE - 1) / len(totals))  # at most
    assert abs(np.mean(totals) - num_rows) < 4 * deviation
    assert 4 * deviation < 0.1 * num_rows


def test_examples_are_the_rows_they_name(dataset: Dataset, examples: Examples) -> None:
    batch = examples.batch("cpu")
    events = batch.cu_seqlens[:-1].long()
    assert batch.num_sequences == examples.rows.size
    assert bool((batch.features[events, 0] == 0).all())
    np.testing.assert_array_equal(examples.context, dataset.context[examples.rows])
    np.testing.assert_array_equal(examples.fraud, dataset.ledger.fraud[examples.rows])


def test_traffic_is_the_last_training_days_as_they_come(dataset: Dataset) -> None:
    start = dataset.ledger.first_day
    traffic = dataset.traffic_examples(start, start + DAYS, 0)
    days = dataset.ledger.day[traffic.rows]
    assert int(days.min()) == start + DAYS - 14
    assert int(days.max()) == start + DAYS - 1
    assert traffic.rows.size == int((dataset.ledger.day >= start + DAYS - 14).sum())
    served = dataset.tree_answers(dataset.ensemble(start, start + DAYS), traffic.rows)
    np.testing.assert_array_equal(traffic.tree, served)


def test_a_model_is_trained_on_examples_and_repeats(examples: Examples) -> None:
    fit = Fit(0, "cpu", "test", TrainSettings(epochs=1, batch_size=64), "tiny")
    models = [fit_model(examples, examples, fit) for _ in range(2)]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    known = examples.context[~np.isnan(examples.context[:, 0]), 0].astype(np.float64)
    mean = float(np.mean(np.sign(known) * np.log1p(np.abs(known))))
    assert float(first["adapters.fraud.context_mean"][0]) == pytest.approx(mean, abs=1e-4)
