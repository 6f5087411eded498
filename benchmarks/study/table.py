"""The table of the study, docs/study/results.csv, with one row per run and processor, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from app.core.files import atomic_file
from app.core.locks import locked
from benchmarks.study import real_pairs
from benchmarks.study.questions import QUESTIONS, tuning
from benchmarks.study.tasks import JUDGED, TASKS, TUNING, TUNING_SEEDS, Run
from benchmarks.study.verdicts import Difference, reward_within
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


class Untuned(LookupError):
    """Settings cannot be chosen before some `runs` have rows."""

    def __init__(self, runs: Sequence[Run]):
        super().__init__(f"{len(runs)} tuning runs of {runs[0].arm} ({runs[0].loss}) have no row yet")
        self.runs = runs


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
    """The rows of the table by run and processor, and what the plan reads from them.

    Rounding takes a run elsewhere on another processor, so only rows of one processor are compared within a seed.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        table = with_measures(table)
        self.by_run: dict[Run, dict[str, dict[Any, Any]]] = {}
        for run, row in zip(runs_of(table), table.to_dict("records"), strict=True):
            self.by_run.setdefault(run, {})[row["processor"]] = row

    def together(self, runs: Iterable[Run]) -> list[str]:
        """Return the processors that have a row of every run."""
        made = [self.by_run.get(run, {}).keys() for run in runs]
        return sorted(set.intersection(*map(set, made))) if made else []

    def to_do(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs to do here, so that all `runs` have rows of one processor."""
        here = processor()
        return [] if self.together(runs) else [run for run in runs if here not in self.by_run.get(run, {})]

    def missing(self, runs: Iterable[Run], seeds: Iterable[int]) -> list[Run]:
        """Return the runs without a row: those of tuning, then those of tuned settings, seed by seed."""
        chosen: list[Run] = []
        left: list[Run] = []
        for run in runs:
            try:
                chosen.append(self.chosen(run))
            except Untuned as error:
                left += error.runs
        for seed in seeds:
            left += self.to_do([replace(run, seed=seed) for run in chosen])
        return list(dict.fromkeys(left))

    def chosen(self, run: Run) -> Run:
        """Return the run with β0 and rate by the plan's rule: six settings on one seed, the best two on four more.

        The best has the highest mean reward at the end; a β0 that is fixed stays. Raises Untuned while runs of a
        round are missing.
        """
        settings = tuning(run)
        for seeds, left in ((TUNING_SEEDS[:1], 2), (TUNING_SEEDS, 1)):
            by_seed = [[replace(one, seed=seed) for one in settings] for seed in seeds]
            if missing := [one for runs in by_seed for one in self.to_do(runs)]:
                raise Untuned(missing)
            reward = dict.fromkeys(settings, 0.0)
            for runs in by_seed:
                where = self.together(runs)[0]
                for setting, one in zip(settings, runs, strict=True):
                    reward[setting] += self.by_run[one][where]["reward"]
            settings = sorted(settings, key=reward.__getitem__, reverse=True)[:left]
        return replace(run, beta0=run.beta0 or settings[0].beta0, learning_rate=settings[0].learning_rate)

    def of(self, run: Run) -> pd.DataFrame:
        """Return the rows of a run without a seed, by seed and processor. Raises LookupError when there is none."""
        made = [rows for each, rows in self.by_run.items() if replace(each, seed=run.seed) == run]
        if not made:
            raise LookupError(f"no rows of {run}")
        table = pd.DataFrame([row for rows in made for row in rows.values()])
        return table.set_index(["seed", "processor"]).sort_index()

    def result(self, label: str, runs: Sequence[Run], seeds: int = 2) -> Result:
        """Return the result of a comparison, paired by seed; rows of different processors are not paired.

        Raises LookupError while it has fewer pairs than `seeds`.
        """
        runs = [self.chosen(run) for run in runs]
        tables = [self.of(run) for run in runs]
        pairs = reduce(pd.Index.intersection, [table.index for table in tables])
        pairs = pairs[~pairs.get_level_values("seed").duplicated()]  # a seed counts once, on whichever processor
        if len(pairs) < seeds:
            raise LookupError(f"{label}: {len(pairs)} pairs of rows, of {seeds}")
        tables, margin = [table.loc[pairs] for table in tables], TASKS[runs[0].task].margin
        by = {}
        for measure in MEASURES:
            values = sum(sign * table[measure].to_numpy(float) for sign, table in zip(SIGNS, tables, strict=False))
            by[measure] = Difference.of(values, margin, QUESTIONS)
        return Result(label, runs, by, [int(table.collapsed.sum()) for table in tables])
