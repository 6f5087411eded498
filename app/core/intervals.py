"""Means with intervals (bootstrap or Wilson), computed in the same way for every reported figure."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MOST_DRAWS = 4_000_000  # largest number of bootstrap draws in memory


class Estimate(NamedTuple):
    """A mean and its interval, at 95 % unless stated otherwise."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean of `values` [n] with its 95 % percentile bootstrap interval.

    The n items, such as one per prompt, must be independent. Raises ValueError if there is none.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("no values to take the mean of")
    random = np.random.default_rng(seed)
    # in chunks, because the audit of a long run has millions of pairs
    at_once = max(MOST_DRAWS // len(values), 1)
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    means = [values[random.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def win_scores(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return 1 where our answer to a prompt has the higher reward, ½ for a tie, else 0."""
    return (1 + np.sign(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))) / 2


def share_over(groups: np.ndarray, hits: np.ndarray) -> Estimate:
    """Return the share of `hits` [n] bool with a 95 % Wilson interval that counts the distinct `groups` [n].

    A pair that occurs in several epochs counts as one item. If its hits differ between epochs, the interval is too
    wide rather than too narrow. Raises ValueError if there is no item.
    """
    return wilson(float(np.mean(hits)) if len(hits) else 0.0, len(np.unique(groups)))


def wilson(share: float, count: int) -> Estimate:
    """Return a share of `count` independent items with its 95 % Wilson interval. ValueError if there is no item."""
    if count < 1:
        raise ValueError("no values to take the mean of")
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0))
