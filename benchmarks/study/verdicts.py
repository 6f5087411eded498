"""The arithmetic of the study: rewards within a KL budget, paired differences, and their verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["better", "worse", "equal within the margin", "undecided"]
ALPHA = 0.05  # of all comparisons of a question together


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of paired differences [n], its interval, and the interval of the tests for equality."""

    mean: float
    low: float
    high: float
    # two one-sided tests (Schuirmann 1987) at level α hold if the 1 − 2α interval lies within the margin
    equal_low: float
    equal_high: float
    margin: float  # smaller differences count as equal
    seeds: int

    @classmethod
    def of(cls, values: np.ndarray, margin: float, comparisons: int = 1) -> Difference:
        """Return the difference for `values` [n], one per seed, at 95 % for all `comparisons` (Bonferroni).

        Raises ValueError for fewer than two seeds, or for a value that is not finite.
        """
        if len(values) < 2 or not np.isfinite(values).all():
            raise ValueError("an interval over seeds needs at least two of them, with finite values")
        mean, error = float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5
        level = ALPHA / comparisons
        wide, narrow = (float(stats.t.ppf(1 - tail, len(values) - 1)) * error for tail in (level / 2, level))
        return cls(mean, mean - wide, mean + wide, mean - narrow, mean + narrow, margin, len(values))

    @property
    def verdict(self) -> Verdict:
        """Return the verdict; a difference within the margin is equal, also where it is not zero."""
        if -self.margin < self.equal_low and self.equal_high < self.margin:
            return "equal within the margin"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "undecided"

    def __str__(self) -> str:
        digits = 2 if self.margin >= 0.1 else 3
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def reward_within(path: Sequence[tuple[float, float]], budget: float) -> float:
    """Return the highest reward on a path of (KL, reward), linear in between, with a KL of at most `budget` nats.

    This is the reward of the best checkpoint within that distance of the SFT model. A temporary spike of the KL
    does not lower it.
    """
    best = path[0][1]
    for (kl0, reward0), (kl1, reward1) in itertools.pairwise(path):
        if kl1 <= budget:
            best = max(best, reward1)
        if min(kl0, kl1) < budget < max(kl0, kl1):
            best = max(best, reward0 + (reward1 - reward0) * (budget - kl0) / (kl1 - kl0))
    return best
