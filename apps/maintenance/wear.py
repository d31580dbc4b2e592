"""Wear of units under changing operating points: regimes, a health index, and its course.

Regimes are found in the operating settings; a sensor that stands still within them is left
out.  The health index is the straight-line forecast of capped life from smoothed sensors.
What is constant for a unit is no feature: with some hundred units it would be its name.

Legend: N rows (one unit at one cycle), S sensors in use, G regimes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from apps.maintenance.cmapss import CAP_CYCLES, Table
from apps.maintenance.fleet import Floats, Floats32, Ints

MAX_REGIMES = 12
CLEAR_SILHOUETTE = 0.8  # of clusters that are operating points and not noise
SAMPLE_ROWS = 3000
STILL_SHARE = 0.5  # a sensor that shows one value more often than this stands still
WINDOWS = (10, 30)  # cycles
EWMA_ALPHA = 0.1
RIDGE = 10.0
SLOPE_WINDOWS = (20, 40, 80)  # cycles
LEAST_CYCLES = 6  # for a slope
NUM_COURSE = 12  # columns of ``index_course``
FLATTEST = -0.05  # of a health index's slope, in cycles per cycle, to divide by


@dataclass(frozen=True, slots=True)
class Regimes:
    """Operating points and the sensors' usual values in each.

    Args:
        centres: In units of ``scale`` [G, 3].
        scale: Of the settings [3].
        mean: Of the used sensors [G, S_used]; deviation: likewise.
        used: Indices of the sensors that move [S_used].
    """

    centres: Floats
    scale: Floats
    mean: Floats
    deviation: Floats
    used: Ints

    def of(self, settings: Floats) -> Ints:
        """Return the regime of each row [N]."""
        scaled = settings / self.scale
        nearest: Ints = ((scaled[:, None] - self.centres) ** 2).sum(axis=2).argmin(axis=1)
        return nearest

    def standardise(self, table: Table) -> Floats:
        """Return the used sensors in deviations from their regime's mean [N, S_used]."""
        regime = self.of(table.settings)
        scaled: Floats = (table.sensors[:, self.used] - self.mean[regime]) / self.deviation[regime]
        return scaled


def find_regimes(train: Table) -> Regimes:
    """Cluster the operating settings; one regime where they form no clear clusters."""
    scale = np.maximum(train.settings.std(axis=0), 1e-9)
    centres = _centres(train.settings / scale)
    regime = ((train.settings[:, None] / scale - centres) ** 2).sum(axis=2).argmin(axis=1)
    groups = [train.sensors[regime == g] for g in range(centres.shape[0])]
    still = np.array([[_mode_share(column) for column in group.T] for group in groups])
    used = np.flatnonzero(np.median(still, axis=0) <= STILL_SHARE)
    mean = np.stack([group[:, used].mean(axis=0) for group in groups])
    deviation = np.stack([group[:, used].std(axis=0) for group in groups])
    return Regimes(centres, scale, mean, np.maximum(deviation, 1e-9), used)


def _centres(scaled: Floats) -> Floats:
    from sklearn.cluster import KMeans  # noqa: PLC0415 - scikit-learn only in training
    from sklearn.metrics import silhouette_score  # noqa: PLC0415 - likewise

    generator = np.random.default_rng(0)
    sample = scaled[generator.permutation(scaled.shape[0])[:SAMPLE_ROWS]]
    best, centres = CLEAR_SILHOUETTE, sample.mean(axis=0, keepdims=True)
    for count in range(2, min(MAX_REGIMES, np.unique(sample, axis=0).shape[0]) + 1):
        clusters = KMeans(count, n_init=4, random_state=0).fit(sample)
        quality = silhouette_score(sample, clusters.labels_)
        if quality > best:
            best, centres = quality, np.asarray(clusters.cluster_centers_, np.float64)
    found: Floats = centres
    return found


def _mode_share(column: Floats) -> float:
    return float(np.unique(column, return_counts=True)[1].max() / column.size)


def recipe_features(table: Table, regimes: Regimes) -> Floats32:
    """Return the published recipe's columns: age, then seven summaries of each used sensor.

    Level, means and deviations over the last 10 and 30 cycles, EWMA, EWMA minus the own mean
    so far; of the unit's past only, [N, 1 + 7 S_used].
    """
    frame = pd.DataFrame(regimes.standardise(table))
    groups = frame.groupby(table.unit)
    means = [groups.rolling(w, min_periods=1).mean().to_numpy() for w in WINDOWS]
    spreads = [groups.rolling(w, min_periods=2).std().to_numpy() for w in WINDOWS]
    trend = groups.ewm(alpha=EWMA_ALPHA).mean().to_numpy()
    drift = trend - groups.expanding().mean().to_numpy()
    columns = [table.cycle[:, None], frame.to_numpy(), *means, *spreads, trend, drift]
    return np.concatenate(columns, axis=1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Wear:
    """How wear is read off a row: regimes, and the weights of the health index.

    Args:
        regimes: Operating points.
        weights: Of the used sensors [S]; offset: Index at their means.
    """

    regimes: Regimes
    weights: Floats
    offset: float


def learn_wear(train: Table) -> Wear:
    """Find the regimes and fit the health index on training units."""
    from sklearn.linear_model import Ridge  # noqa: PLC0415 - scikit-learn only in training

    regimes = find_regimes(train)
    scaled = pd.DataFrame(regimes.standardise(train))
    smoothed = scaled.groupby(train.unit).rolling(10, min_periods=1).mean()
    index = Ridge(RIDGE).fit(smoothed.to_numpy(), np.minimum(train.rul, CAP_CYCLES))
    return Wear(regimes, index.coef_.astype(np.float64), float(index.intercept_))


def wear_features(table: Table, wear: Wear) -> Floats32:
    """Return the recipe's columns, each sensor's slope over the life, and the index's course."""
    scaled = wear.regimes.standardise(table)
    age = table.cycle.astype(np.float64)[:, None]
    slopes = life_slopes(table, scaled)
    index = (scaled @ wear.weights + wear.offset)[:, None]
    columns: list[Floats | Floats32] = [
        recipe_features(table, wear.regimes),
        slopes,
        slopes * age,
        index_course(table, index),
    ]
    return np.concatenate(columns, axis=1).astype(np.float32)


def index_course(table: Table, index: Floats) -> Floats:
    """Return how the health index has moved since the unit's beginning, and where it heads.

    EWMA and 20-cycle mean minus the own mean, 20- minus 50-cycle mean, slope over the life and
    times age, slopes over windows, cycles to zero at three of these slopes, fast minus slow EWMA.
    """
    groups = pd.DataFrame(index).groupby(table.unit)
    own = groups.expanding().mean().to_numpy()
    fast = groups.ewm(alpha=EWMA_ALPHA).mean().to_numpy()
    slow = groups.ewm(alpha=EWMA_ALPHA / 2).mean().to_numpy()
    short, long = (groups.rolling(w, min_periods=1).mean().to_numpy() for w in (20, 50))
    slope = life_slopes(table, index)
    windows = [window_slopes(table, index, width) for width in SLOPE_WINDOWS]
    to_zero = [fast / np.minimum(s, FLATTEST) for s in (*windows[1:], slope)]
    age = table.cycle[:, None]
    moved = [fast - own, short - own, short - long, slope, slope * age]
    return np.concatenate([*moved, *windows, *to_zero, fast - slow], axis=1)


def life_slopes(table: Table, values: Floats) -> Floats:
    """Return the least-squares slope of each column over the unit's life so far [N, columns]."""
    count = pd.DataFrame(values[:, :1]).groupby(table.unit).cumcount().to_numpy()[:, None] + 1.0
    moment = count - 1.0
    sum_v = pd.DataFrame(values).groupby(table.unit).cumsum().to_numpy()
    sum_tv = pd.DataFrame(values * moment).groupby(table.unit).cumsum().to_numpy()
    sum_t, sum_tt = count * moment / 2, moment * count * (2 * count - 1) / 6
    spread = np.maximum(count * sum_tt - sum_t**2, 1.0)
    slope: Floats = (count * sum_tv - sum_t * sum_v) / spread
    return np.where(count >= LEAST_CYCLES, slope, np.nan)


def window_slopes(table: Table, values: Floats, width: int) -> Floats:
    """Return the least-squares slope of each column over the last ``width`` cycles."""
    moment = np.broadcast_to(table.cycle[:, None].astype(np.float64), values.shape)

    def mean(part: Floats) -> Floats:
        rolled = (
            pd.DataFrame(part).groupby(table.unit).rolling(width, min_periods=LEAST_CYCLES).mean()
        )
        result: Floats = rolled.to_numpy()
        return result

    mean_t, mean_v = mean(moment), mean(values)
    spread = np.maximum(mean(moment * moment) - mean_t**2, 1e-9)
    slope: Floats = (mean(moment * values) - mean_t * mean_v) / spread
    return slope
