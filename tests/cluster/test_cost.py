"""The cost model learns what steps take."""

import numpy as np
import pytest

from cluster.cost import PRIOR_STEP_MS, CostModel


def test_recovers_step_and_token_cost_of_two_tasks_from_mixed_steps() -> None:
    cost = CostModel()
    rng = np.random.default_rng(3)
    for _ in range(300):
        tokens = {"a": int(rng.integers(0, 900)), "b": int(rng.integers(0, 900))}
        cost.observe(tokens, 3.0 + 0.02 * tokens["a"] + 0.05 * tokens["b"] + rng.normal(0, 0.1))
    assert cost.step_ms == pytest.approx(3.0, abs=0.2)
    assert cost.token_ms("a") == pytest.approx(0.02, rel=0.03)
    assert cost.token_ms("b") == pytest.approx(0.05, rel=0.03)
    assert cost.predict_ms({"a": 100, "b": 200}) == pytest.approx(15.0, rel=0.03)


def test_follows_a_machine_that_becomes_twice_as_slow() -> None:
    cost = CostModel()
    rng = np.random.default_rng(4)
    for slowness in (1.0, 2.0):
        for _ in range(300):
            n = int(rng.integers(10, 900))
            cost.observe({"a": n}, slowness * (2.0 + 0.03 * n))
    assert cost.predict_ms({"a": 500}) == pytest.approx(34.0, rel=0.05)


def test_equal_steps_leave_a_prediction_that_fits_them_and_nothing_negative() -> None:
    cost = CostModel()
    for _ in range(200):
        cost.observe({"a": 400}, 1.0)  # far below the prior
    assert cost.predict_ms({"a": 400}) == pytest.approx(1.0, abs=0.5)
    assert cost.step_ms >= 0
    assert cost.token_ms("a") > 0
    assert cost.token_ms("unseen") > 0


@pytest.mark.slow
def test_equal_steps_do_not_forget_how_the_cost_splits() -> None:
    """An hour of batch work leaves the fixed cost that steps of several sizes had shown."""
    cost = CostModel()
    rng = np.random.default_rng(5)
    for n in rng.integers(10, 900, size=100):
        cost.observe({"a": int(n)}, 4.0 + 0.01 * int(n))
    for _ in range(20_000):
        n = int(rng.integers(4900, 5100))
        cost.observe({"a": n}, (4.0 + 0.01 * n) * rng.normal(1.0, 0.1))
    assert cost.step_ms == pytest.approx(4.0, abs=2.0)
    assert cost.predict_ms({"a": 5000}) == pytest.approx(54.0, rel=0.05)


def test_before_any_step_the_prior_speaks() -> None:
    assert CostModel().predict_ms({}) == PRIOR_STEP_MS
