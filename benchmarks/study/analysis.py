"""The analysis of the study's rows: differences with intervals, and verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from app.intervals import bootstrap_mean
from benchmarks.study.runs import STEPS

KL_BUDGET = 1.0  # nats
COLLAPSED = 0.25  # a run with a larger share of malformed answers has collapsed
ROBUST = 0.2  # points of reward: smaller differences count as robust

Verdict = Literal["holds here", "does not hold here", "cannot be decided here"]


def path_of(row: pd.Series) -> list[tuple[float, float]]:
    """Return (KL, reward) of the SFT model and of every checkpoint in order."""
    ends = ["" if step == STEPS[-1] else f"_{step}" for step in STEPS]
    return [(0.0, float(row.sft_reward)), *((float(row[f"kl{e}"]), float(row[f"reward{e}"])) for e in ends)]


def reward_within(path: Sequence[tuple[float, float]], budget: float = KL_BUDGET) -> float:
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


def with_best(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a further column `within`, the highest reward within the KL budget."""
    return table.assign(within=[reward_within(path_of(row)) for _, row in table.iterrows()])


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of paired differences, with Student's t interval."""

    mean: float
    low: float
    high: float
    seeds: int
    bootstrap: tuple[float, float]  # 95 %, for orientation only: too narrow with few seeds

    @classmethod
    def of(cls, values: np.ndarray, comparisons: int = 1) -> Difference:
        """Return the difference for `values` [n], one per seed, at 95 % for all `comparisons` (Bonferroni).

        Raises ValueError for fewer than two seeds.
        """
        if len(values) < 2:
            raise ValueError("an interval over seeds needs at least two of them")
        half = stats.t.ppf(1 - 0.025 / comparisons, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
        rough = bootstrap_mean(values)
        mean = float(values.mean())
        return cls(mean, mean - half, mean + half, len(values), (rough.low, rough.high))

    @property
    def above(self) -> bool:
        return self.low > 0

    @property
    def below(self) -> bool:
        return self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def better(end: Difference, within: Difference) -> Verdict:
    """Return the verdict on whether an arm is better by one of the primary measures and not worse by the other."""
    if (end.above and not within.below) or (within.above and not end.below):
        return "holds here"
    if (end.below and not within.above) or (within.below and not end.above):
        return "does not hold here"
    return "cannot be decided here"


def robust(differences: Sequence[Difference]) -> Verdict:
    """Return the verdict on whether every interval lies within ±ROBUST."""
    if any(each.low > ROBUST or each.high < -ROBUST for each in differences):
        return "does not hold here"
    if all(each.low >= -ROBUST and each.high <= ROBUST for each in differences):
        return "holds here"
    return "cannot be decided here"


class Rows:
    """The rows of one phase, grouped into cells."""

    def __init__(self, table: pd.DataFrame, phase: str = "confirmation") -> None:
        self.table = with_best(table[table.phase == phase])

    def cell(
        self,
        arm: str,
        data: str = "mixed",
        flips: float = 0.15,
        loss: str = "sigmoid",
        beta0: float | None = None,
        alpha: float = 0.6,
        keep: float = 0.8,
    ) -> pd.DataFrame:
        """Return the rows of one cell, indexed by seed. Raises LookupError when there is none."""
        t = self.table
        rows = t[(t.arm == arm) & (t.data == data) & (t.flip_rate == flips) & (t.loss == loss)]
        rows = rows[(rows.alpha == alpha) & (rows.keep_ratio == keep)]
        rows = rows if beta0 is None else rows[rows.beta0 == beta0]
        if rows.empty:
            raise LookupError(f"no rows of {arm} on {data}, flips {flips}, {loss}, β0 {beta0}")
        return rows.set_index("seed").sort_index()

    @staticmethod
    def difference(
        ours: pd.DataFrame, theirs: pd.DataFrame, figure: str = "reward", comparisons: int = 1
    ) -> Difference:
        """Return ours minus theirs over the seeds that both have."""
        seeds = ours.index.intersection(theirs.index)
        values = ours.loc[seeds, figure].to_numpy(float) - theirs.loc[seeds, figure].to_numpy(float)
        return Difference.of(values, comparisons)
