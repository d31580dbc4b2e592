"""What remaining life is told by: shares of experts and of the excess, from held-out units."""

import numpy as np
import pytest

from apps.maintenance.training.life_choice import best_share, choose_excess, with_excess


def test_the_share_is_that_of_the_expert_who_is_less_wrong() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.0, 120.0, 4000)
    tree = (truth + rng.normal(0.0, 10.0, 4000)).astype(np.float32)
    sequence = (truth + rng.normal(0.0, 5.0, 4000)).astype(np.float32)
    weight = np.ones(4000, np.float32)
    share = best_share(tree, sequence, truth.astype(np.float32), weight)
    assert share == pytest.approx(10.0**2 / (10.0**2 + 5.0**2), abs=0.03)
    assert best_share(
        truth.astype(np.float32), sequence, truth.astype(np.float32), weight
    ) == pytest.approx(0.05)


def test_excess_counts_if_it_is_true() -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform(60.0, 150.0, 500)
    early = np.minimum(truth, 125.0)
    assert choose_excess(np.stack([early, truth], axis=1), truth) == 1.0
    noise = early + rng.exponential(40.0, 500)
    assert choose_excess(np.stack([early, noise], axis=1), early) == 0.0


def test_no_excess_is_taken_from_early_life() -> None:
    lives = np.array([[100.0, 90.0], [125.0, 165.0]])
    assert with_excess(lives, 0.5).tolist() == [100.0, 145.0]
