"""Means with bootstrap intervals, the same everywhere a figure is reported."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MOST_DRAWS = 4_000_000  # held in memory at a time


class Estimate(NamedTuple):
    """A mean and its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of `values` [n], resampling its n independent items (one per prompt). Raises ValueError if empty."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("no values to take the mean of")
    random = np.random.default_rng(seed)
    # some resamples at a time: the audit of a long run has millions of pairs
    at_once = max(MOST_DRAWS // len(values), 1)
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    means = [values[random.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def win_scores(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where our answer to a prompt has the higher reward, ½ for a tie, else 0."""
    return (1 + np.sign(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))) / 2


def share_over(groups: np.ndarray, hits: np.ndarray) -> Estimate:
    """Return the share of `hits` [n] bool with a 95 % interval over the distinct `groups` [n].

    A pair that is met in several epochs is one item and not several. Where the looks at it differ, this is too wide
    rather than too narrow. Raises ValueError if there is none.
    """
    return wilson(float(np.mean(hits)) if len(hits) else 0.0, len(np.unique(groups)))


def wilson(share: float, count: int) -> Estimate:
    """A share of `count` independent items with its 95 % Wilson interval. Raises ValueError if there is none."""
    if count < 1:
        raise ValueError("no values to take the mean of")
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0))
