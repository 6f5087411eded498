"""The table of the study, docs/study/results.csv, with one row per run and processor, and what follows from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from app.core.files import atomic_file, locked
from app.core.intervals import Estimate
from benchmarks.study import real_pairs
from benchmarks.study.plan import JUDGED, QUESTIONS, TASKS, TUNING, TUNING_SEEDS, Run, tuning
from benchmarks.tables import ROOT, processor

RESULTS = ROOT / "docs" / "study" / "results.csv"
KEY = [each.name for each in fields(Run)]
FIGURES = [
    *("accuracy", "reward", "win_rate", "malformed", "kl"),
    *(f"{figure}_{step}" for step in (16, 32, 48) for figure in ("reward", "kl", "malformed")),
    *("log_ratio_chosen", "log_ratio_rejected", "dropped_flipped", "dropped_clean"),
    *("clamped", "beta_low", "beta_high", "gap", "sft_reward", "sft_malformed"),
    *(f"{signal}_{percent}" for signal in real_pairs.SIGNALS for percent in real_pairs.SHARES),
    "seconds",
]
ROW = [*KEY, "processor"]  # a run has a row for every processor that did it
COLUMNS = [*ROW, *FIGURES]
MEASURES = ("reward", "within", "per_root")  # at the end, within the KL budget, gain per √KL
SIGNS = (1, -1, -1, 1)  # of the runs of a comparison
ALPHA = 0.05  # of all comparisons of a question together
Verdict = Literal["better", "worse", "equal within the margin", "undecided"]


def read_results(path: Path = RESULTS) -> pd.DataFrame:
    """Return the table at `path`, empty if there is no file."""
    return pd.read_csv(path).fillna({"options": ""}) if path.exists() else pd.DataFrame(columns=COLUMNS)


def append_result(row: Mapping[str, object], path: Path = RESULTS) -> None:
    """Put a row in its place and replace an earlier one of the same run and processor, atomically."""
    with locked(path.with_suffix(".lock"), f"The table {path}", "name another file"):
        before, fresh = read_results(path), pd.DataFrame([row], columns=COLUMNS)
        table = fresh if before.empty else pd.concat([before, fresh])
        table = table.drop_duplicates(ROW, keep="last").sort_values(ROW, kind="stable")
        with atomic_file(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")


def runs_of(table: pd.DataFrame) -> list[Run]:
    """Return the run of every row."""
    return [Run(**row) for row in table[KEY].to_dict("records")]


def with_measures(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with what the verdicts read.

    `collapsed`: whether a run has; in tuning and judging its `reward` then is that of the SFT model. `within`: the
    highest reward within the KL budget of its task. `per_root`: the gain in reward over √KL at the end.
    """
    collapsed = table.malformed > [TASKS[task].collapsed for task in table.task]
    reward = table.reward.mask(collapsed & table.phase.isin((TUNING, JUDGED)), table.sft_reward)
    return table.assign(
        collapsed=collapsed,
        within=[reward_within(path_of(row), TASKS[row.task].budget) for _, row in table.iterrows()],
        reward=reward,
        per_root=(reward - table.sft_reward) / np.sqrt(table.kl.astype(float).clip(lower=1e-3)),
    )


def path_of(row: pd.Series) -> list[tuple[float, float]]:
    """Return (KL, reward) of the SFT model and of every checkpoint in order."""
    ends = [*(f"_{step}" for step in TASKS[row.task].steps[:-1]), ""]
    return [(0.0, float(row.sft_reward)), *((float(row[f"kl{e}"]), float(row[f"reward{e}"])) for e in ends)]


def reward_within(path: Sequence[tuple[float, float]], budget: float) -> float:
    """Return the highest reward on a path of (KL, reward), linear in between, with a KL of at most `budget` nats.

    It is that of the best checkpoint within this distance of the SFT model; a spike of the KL does not lower it.
    """
    best = path[0][1]
    for (kl0, reward0), (kl1, reward1) in itertools.pairwise(path):
        if kl1 <= budget:
            best = max(best, reward1)
        if min(kl0, kl1) < budget < max(kl0, kl1):
            best = max(best, reward0 + (reward1 - reward0) * (budget - kl0) / (kl1 - kl0))
    return best


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of paired differences with its interval, and the verdict on it."""

    estimate: Estimate
    margin: float  # smaller differences count as equal
    verdict: Verdict
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float], margin: float = 0.0, comparisons: int = 1) -> Difference:
        """Return the difference for `values` [n], one per seed, at 95 % for all `comparisons` (Bonferroni).

        A difference within the margin is equal, also where it is not zero: two one-sided tests (Schuirmann 1987) at
        level α hold if the 1 − 2α interval lies within the margin. Raises ValueError for fewer than two seeds, or
        for a value that is not finite.
        """
        found = np.asarray(values, dtype=float)
        if len(found) < 2 or not np.isfinite(found).all():
            raise ValueError("an interval over seeds needs at least two of them, with finite values")
        mean, error = float(found.mean()), float(found.std(ddof=1)) / len(found) ** 0.5
        level = ALPHA / comparisons
        wide, narrow = (float(stats.t.ppf(1 - tail, len(found) - 1)) * error for tail in (level / 2, level))
        verdict: Verdict = "undecided"
        if abs(mean) + narrow < margin:
            verdict = "equal within the margin"
        elif abs(mean) > wide:
            verdict = "better" if mean > 0 else "worse"
        return cls(Estimate(mean, mean - wide, mean + wide), margin, verdict, len(found))

    def text(self, sign: str = "+") -> str:
        mean, low, high = (f"{value:{sign}.{2 if self.margin >= 0.1 else 3}f}" for value in self.estimate)
        return f"{mean} [{low}, {high}]"


class Untuned(LookupError):
    """Settings cannot be chosen before some runs, its argument, have rows."""


class Result(NamedTuple):
    """What a comparison found, paired by seed."""

    label: str
    runs: Sequence[Run]  # with the settings that tuning chose
    by: Mapping[str, Difference]  # by measure
    collapsed: Sequence[int]  # of the seeds that are compared, for each run

    @property
    def task(self) -> str:
        return self.runs[0].task


class Rows:
    """The rows of every run. Within a seed only rows of one processor are compared, because rounding differs."""

    def __init__(self, table: pd.DataFrame) -> None:
        table = with_measures(table).assign(run=[replace(run, seed=-1) for run in runs_of(table)])
        table = table.set_index(["seed", "processor"]).sort_index()
        self.none = table.head(0)
        self.of = dict(list(table.groupby("run", sort=False)))

    def shared(self, runs: Sequence[Run]) -> pd.MultiIndex:
        """Return (seed, processor) of the seeds that one processor did with all `runs`; each counts once."""
        both = reduce(pd.Index.intersection, [self.of.get(run, self.none).index for run in runs])
        return both[~both.get_level_values("seed").duplicated()]

    def to_do(self, runs: Sequence[Run], seeds: Iterable[int]) -> list[Run]:
        """Return the runs to do here, so that at each seed all `runs` have rows of one processor."""
        here, done = processor(), set(self.shared(runs).get_level_values("seed"))
        return [
            replace(run, seed=seed)
            for seed in seeds
            for run in runs
            if seed not in done and (seed, here) not in self.of.get(run, self.none).index
        ]

    def missing(self, runs: Iterable[Run], seeds: Iterable[int]) -> list[Run]:
        """Return the runs without a row: those of tuning, then those of tuned settings, seed by seed."""
        chosen: list[Run] = []
        left: list[Run] = []
        for run in runs:
            try:
                chosen.append(self.chosen(run))
            except Untuned as error:
                left += error.args[0]
        return list(dict.fromkeys([*left, *(self.to_do(chosen, seeds) if chosen else [])]))

    def chosen(self, run: Run) -> Run:
        """Return the run with β0 and rate by the plan's rule: six settings on one seed, the best two on four more.

        The best has the highest mean reward at the end; a β0 that is fixed stays. Raises Untuned while runs of a
        round are missing.
        """
        settings = tuning(run)
        for seeds, left in ((TUNING_SEEDS[:1], 2), (TUNING_SEEDS, 1)):
            if missing := self.to_do(settings, seeds):
                raise Untuned(missing)
            rows = self.shared(settings)
            rows = rows[rows.get_level_values("seed").isin(seeds)]
            reward = {one: self.of[one].reward[rows].sum() for one in settings}
            settings = sorted(settings, key=reward.__getitem__, reverse=True)[:left]
        return replace(run, beta0=run.beta0 or settings[0].beta0, learning_rate=settings[0].learning_rate)

    def result(self, label: str, runs: Sequence[Run], seeds: int = 2) -> Result:
        """Return the result of a comparison. Raises LookupError while it has fewer pairs than `seeds`."""
        runs = [self.chosen(run) for run in runs]
        pairs, margin = self.shared(runs), TASKS[runs[0].task].margin
        if len(pairs) < seeds:
            raise LookupError(f"{label}: {len(pairs)} pairs of rows, of {seeds}")
        tables, by = [self.of[run].loc[pairs] for run in runs], {}
        for measure in MEASURES:
            values = sum(sign * table[measure].to_numpy(float) for sign, table in zip(SIGNS, tables, strict=False))
            by[measure] = Difference.of(values, margin, len(QUESTIONS))
        return Result(label, runs, by, [int(table.collapsed.sum()) for table in tables])
