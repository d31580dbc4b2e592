"""What remaining life is told by, chosen on units that were held out.

Legend: N rows, U units.
"""

from typing import NamedTuple

import numpy as np

from apps.maintenance.cmapss import CAP_CYCLES, nasa_score, rmse
from apps.maintenance.fleet import Floats, Floats32
from apps.maintenance.intervals import band_margins
from apps.maintenance.training.life_fit import NUM_LIVES, LifeExamples

REACH = 1.2  # of the cap; with more left nobody asks


class LifeChoice(NamedTuple):
    """What is chosen.

    Args:
        share: Of the sequence experts in early life and life [2].
        excess: Share of what is forecast beyond early life that counts.
        margins: Added below and above the interval by band, in cycles [bands, 2].
    """

    share: Floats
    excess: float
    margins: Floats


def choose_life(examples: LifeExamples, tree: Floats32, outputs: Floats32) -> LifeChoice:
    """Choose on the answers of models that have not seen the rows' units.

    Only rows with up to ``REACH`` times the cap left count.  A unit is asked once, at any of
    them, so that for the interval all its rows together weigh as much as another unit's.

    Args:
        examples: Rows [N].
        tree: Lives as the trees have them [N, 2].
        outputs: Columns of the task [N, 9].
    """
    asked = examples.lives[:, 1] <= REACH * CAP_CYCLES
    truth, weight = examples.lives[asked], examples.weight[asked]
    trees, sequence = tree[asked], outputs[asked, 2 * NUM_LIVES : 3 * NUM_LIVES]
    share = np.array(
        [best_share(trees[:, i], sequence[:, i], truth[:, i], weight) for i in range(NUM_LIVES)]
    )
    lives = trees + share * (sequence - trees)
    unit = examples.unit[asked]
    margins = band_margins(outputs[asked, 3 * NUM_LIVES :], truth[:, 1], CAP_CYCLES, unit)
    return LifeChoice(share, choose_excess(lives, truth[:, 1].astype(np.float64)), margins)


def best_share(tree: Floats32, sequence: Floats32, truth: Floats32, weight: Floats32) -> float:
    """Return the share of the sequence experts with the least squared error, in [.05, .95]."""
    step, missing = sequence - tree, truth - tree
    share = (weight * step * missing).sum() / max(float((weight * step * step).sum()), 1e-9)
    return float(np.clip(share, 0.05, 0.95))


def with_excess(lives_N2: Floats, share: float) -> Floats:
    """Return life: early life and a share of what is forecast beyond it [N]."""
    beyond = np.maximum(lives_N2[:, 1] - lives_N2[:, 0], 0.0)
    total: Floats = lives_N2[:, 0] + share * beyond
    return total


def choose_excess(lives_N2: Floats, truth: Floats) -> float:
    """Return the share of the excess with the least RMSE x score."""

    def cost(share: float) -> float:
        life = with_excess(lives_N2, share)
        return rmse(life, truth) * nasa_score(life, truth)

    return float(min(np.linspace(0.0, 1.0, 21), key=cost))
