"""Gate, cautions and margin from answers of models that have not seen the rows."""

import numpy as np
import torch

from apps.maintenance.inputs import COLUMNS, LIFE_CAP_HOURS, Series
from apps.maintenance.protocol import HORIZONS
from apps.maintenance.training.fit import Examples, choose, mixed
from core_model.config import PRESETS
from core_model.hazard import HazardHead
from core_model.packing import Encoded
from core_model.series_tasks import FORECAST, NUM_COMPONENTS, NUM_HAZARDS

NUM_ROWS = 2000


def examples() -> Examples:
    """Rows of 20 machines; a component of a quarter of them fails within 72 h."""
    rng = np.random.default_rng(0)
    hours = np.full((NUM_ROWS, NUM_COMPONENTS), 10**6)
    fails = np.flatnonzero(rng.random(NUM_ROWS) < 0.25)
    hours[fails, rng.integers(0, NUM_COMPONENTS, fails.size)] = rng.integers(1, 73, fails.size)
    empty = Series(
        np.zeros((0, FORECAST.d_task), np.float32),
        np.zeros(NUM_ROWS + 1, np.int32),
        np.full((NUM_ROWS, len(COLUMNS)), np.nan, np.float32),
    )
    return Examples(
        empty,
        np.arange(NUM_ROWS) % 20,
        hours,
        np.full(NUM_ROWS, 1000),
        np.minimum(hours.min(axis=1), LIFE_CAP_HOURS).astype(np.float32),
        np.ones(NUM_ROWS, np.float32),
    )


def knowing(rows: Examples, sure: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return hazards of one who knows the bucket of each failure, as sure as that."""
    ends = np.array(HORIZONS)[None, :, None]
    starts = np.concatenate([[0], HORIZONS[:-1]])[None, :, None]
    fails = (rows.hours[:, None] > starts) & (rows.hours[:, None] <= ends)
    return np.where(fails, sure, -sure).reshape(NUM_ROWS, NUM_HAZARDS).astype(np.float32)


def test_the_gate_goes_to_the_expert_who_knows() -> None:
    rows = examples()
    guess = np.full((NUM_ROWS, NUM_HAZARDS), -3.0, np.float32)
    hours = np.log1p(np.stack([rows.left * 0.9, rows.left, rows.left * 1.1], axis=1))
    chosen = choose(rows, guess, np.concatenate([knowing(rows, 5.0), hours], axis=1))
    assert (chosen.gate > 1.0).all()
    other = choose(rows, knowing(rows, 5.0), np.concatenate([guess, hours], axis=1))
    assert (other.gate < -1.0).all()
    assert chosen.margin <= 0.0


def test_shy_probabilities_get_a_small_caution() -> None:
    rows = examples()
    shy = knowing(rows, 1.0) - 3.0  # right in order, but never above one half
    hours = np.zeros((NUM_ROWS, 3), np.float32)
    chosen = choose(rows, shy, np.concatenate([shy, hours], axis=1))
    assert all(chosen.caution[h] < 0.5 for h in HORIZONS)


def test_experts_are_mixed_as_the_head_mixes_them() -> None:
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    head = HazardHead(config).eval()
    head.gate.copy_(torch.randn(len(HORIZONS), NUM_COMPONENTS))
    tree = torch.randn(2, NUM_HAZARDS)
    tokens = torch.randn(6, config.d_model)
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    spans = torch.tensor([0, 1, 3, 4, 6], dtype=torch.int32)
    side = {"tree": tree, "beside": torch.tensor([1, 4]), "buckets": torch.rand(2, len(HORIZONS))}
    with torch.no_grad():
        columns, _ = head(tokens, Encoded(tokens, offsets, spans, side))
    named = dict(zip(FORECAST.outputs, columns.unbind(1), strict=True))
    hazard, sequence = (
        torch.stack([named[f"{name}_{i}"] for i in range(NUM_HAZARDS)], dim=1).numpy()
        for name in ("hazard", "sequence_hazard")
    )
    np.testing.assert_allclose(
        mixed(tree.numpy(), sequence, head.gate.numpy()), hazard, rtol=1e-5, atol=1e-5
    )
    assert not np.allclose(hazard, sequence)
