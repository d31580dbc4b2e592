"""What is chosen on validation folds, and what the test folds then show."""

from pathlib import Path

import numpy as np
import pytest

from apps.fraud.protocol import DELAY_DAYS, TEST_STARTS, VALIDATION_STARTS, Fold, Ledger
from apps.fraud.report import Report, as_text, fixed_mean, run_path

ROWS_PER_DAY = 40
FIRST_DAY = Fold(VALIDATION_STARTS[0]).start_day
NUM_DAYS = Fold(TEST_STARTS[-1]).train_end + DELAY_DAYS + 7 - FIRST_DAY


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    """Every card pays once; a tenth of the payments is fraud."""
    num = NUM_DAYS * ROWS_PER_DAY
    return Ledger(
        day=np.repeat(np.arange(FIRST_DAY, FIRST_DAY + NUM_DAYS), ROWS_PER_DAY),
        card=np.arange(num),
        fraud=np.arange(num) % 10 == 0,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ledger: Ledger) -> Path:
    """Runs whose gated logit is right, whose trees are noisy and whose sequence logit is noise."""
    path = tmp_path_factory.mktemp("runs")
    for start in (*TEST_STARTS, *VALIDATION_STARTS):
        for seed in range(2 if start in TEST_STARTS else 1):
            generator = np.random.default_rng(seed)
            fraud = ledger.fraud[Fold(start).test_rows(ledger)]
            noise = generator.normal(size=(2, fraud.size))
            outputs = np.stack([np.where(fraud, 2.0, -2.0), 2 * fraud + noise[0], noise[1]], axis=1)
            load = np.array([[4.0, 4.0], [6.0, 2.0 * seed]])
            np.savez(run_path(path, start, seed), outputs=outputs, load=load, seconds=1.0)
    return path


def test_noise_gets_the_smallest_weight_and_the_threshold_reaches_the_recall(
    folder: Path, ledger: Ledger
) -> None:
    report = Report(ledger, folder, num_seeds=2)
    assert report.weight <= 0.15
    assert report.threshold == 2.0


def test_figures_of_a_perfect_system(folder: Path, ledger: Ledger) -> None:
    figures = Report(ledger, folder, num_seeds=2).figures()
    assert figures["ap"] == 1.0
    assert figures["ap_std"] == 0.0
    assert set(figures["fp_at_recall"].values()) == {0.0}
    assert figures["realised"]["fp"] == 0.0
    assert figures["realised"]["recall"] == 1.0
    assert figures["baseline"]["trees"]["ap"] < 1.0
    assert len(figures["seeds"]) == 2
    assert figures["per_fold"][0]["utilisation"] == pytest.approx(
        [1.0, (0.5 + 2 / 3) / 2], abs=1e-4
    )
    assert figures["dead_experts"] == len(TEST_STARTS)
    low, high = figures["seeds"][0]["reduction_95"]["trees"]
    assert low == high == 1.0
    text = as_text(figures)
    assert all(start in text for start in TEST_STARTS)


def test_fixed_mean_lies_between_its_parts() -> None:
    scores = {"tree_logit": np.array([0.0]), "sequence_logit": np.array([4.0])}
    assert fixed_mean(scores, 0.25).tolist() == [1.0]
