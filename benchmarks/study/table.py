"""The table of the study: one row per finished run, in docs/study/results.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from app.files import atomic_file
from app.locks import locked
from benchmarks.study.runs import STEPS, StudyRun

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "study" / "results.csv"

SETTINGS = ("seed", "data", "flip_rate", "loss", "arm", "beta0", "learning_rate", "alpha", "keep_ratio")
BY_STEP = tuple(f"{figure}_{step}" for step in STEPS[:-1] for figure in ("reward", "kl", "malformed"))
FIGURES = (
    *("accuracy", "reward", "win_rate", "malformed", "kl", *BY_STEP),
    *("log_ratio_chosen", "log_ratio_rejected", "dropped_flipped", "dropped_clean"),
    *("clamped", "beta_low", "beta_high", "sft_reward", "sft_malformed", "seconds"),
)
COLUMNS = ("phase", *SETTINGS, *FIGURES)


def read_results(path: Path = RESULTS) -> pd.DataFrame:
    """Return the table at `path`, empty if there is no file."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(COLUMNS))


def append_result(row: Mapping[str, object], path: Path = RESULTS) -> None:
    """Put a row in its place and replace an earlier row of the same run; the file is written atomically."""
    with locked(path.with_suffix(".lock"), f"The table {path}", "name another file"):
        before = read_results(path)
        fresh = pd.DataFrame([row], columns=list(COLUMNS))
        table = fresh if before.empty else pd.concat([before, fresh])
        table = table.drop_duplicates(["phase", *SETTINGS], keep="last")
        table = table.sort_values(["phase", *SETTINGS], kind="stable")
        with atomic_file(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")


def row_of(run: StudyRun, phase: str, table: pd.DataFrame) -> pd.Series | None:
    """Return the row of a run, if it has one."""
    same = table.phase == phase
    for name, value in run.settings().items():
        same &= table[name] == value
    return table[same].iloc[-1] if bool(same.any()) else None


def is_done(run: StudyRun, phase: str, table: pd.DataFrame) -> bool:
    """Return whether the table has a row of the run."""
    return row_of(run, phase, table) is not None
