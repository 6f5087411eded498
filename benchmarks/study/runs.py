"""The runs of the study: one row per run in docs/study/results.csv, and the work that makes it."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from app.core.files import atomic_file
from app.core.locks import locked
from app.main import main
from app.report.run import read_run
from benchmarks.study import real_pairs, sentiment
from benchmarks.study.tasks import JUDGED, TASKS, TUNING, Command, Run
from benchmarks.study.verdicts import reward_within
from benchmarks.tables import ROOT, processor

RESULTS = ROOT / "docs" / "study" / "results.csv"
OWN = {"sentiment": sentiment.main, "real_pairs": real_pairs.main}  # commands that are not those of beta-dpo

# --- the table ----------------------------------------------------------------------------------------------

KEY = tuple(each.name for each in fields(Run))
BY_STEP = tuple(f"{figure}_{step}" for step in (16, 32, 48) for figure in ("reward", "kl", "malformed"))
FIGURES = (
    *("accuracy", "reward", "win_rate", "malformed", "kl", *BY_STEP, "log_ratio_chosen", "log_ratio_rejected"),
    *("dropped_flipped", "dropped_clean", "clamped", "beta_low", "beta_high", "gap", "sft_reward", "sft_malformed"),
    *(f"{signal}_{percent}" for signal in real_pairs.SIGNALS for percent in real_pairs.SHARES),
    "seconds",
)
ROW = (*KEY, "processor")  # a run has a row for every processor that did it
COLUMNS = (*ROW, *FIGURES)


def read_results(path: Path = RESULTS) -> pd.DataFrame:
    """Return the table at `path`, empty if there is no file."""
    return pd.read_csv(path).fillna({"options": ""}) if path.exists() else pd.DataFrame(columns=list(COLUMNS))


def append_result(row: Mapping[str, object], path: Path = RESULTS) -> None:
    """Put a row in its place and replace an earlier one of the same run and processor, atomically."""
    with locked(path.with_suffix(".lock"), f"The table {path}", "name another file"):
        before, fresh = read_results(path), pd.DataFrame([row], columns=list(COLUMNS))
        table = fresh if before.empty else pd.concat([before, fresh])
        table = table.drop_duplicates(list(ROW), keep="last").sort_values(list(ROW), kind="stable")
        with atomic_file(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")


def runs_of(table: pd.DataFrame) -> list[Run]:
    """Return the run of every row."""
    return [Run(**row) for row in table[list(KEY)].to_dict("records")]


def with_measures(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with what the verdicts read.

    `collapsed`: whether a run has; in tuning and judging its `reward` then is that of the SFT model. `within`: the
    highest reward within the KL budget of its task. `per_root`: the gain in reward over √KL at the end.
    """
    rows = [row for _, row in table.iterrows()]
    collapsed = np.array([row.malformed > TASKS[row.task].collapsed for row in rows], bool)
    lost = collapsed & table.phase.isin((TUNING, JUDGED)).to_numpy(bool)
    reward = table.reward.where(~lost, table.sft_reward)
    return table.assign(
        collapsed=collapsed,
        within=[reward_within(path_of(row), TASKS[row.task].budget) for row in rows],
        reward=reward,
        per_root=(reward - table.sft_reward) / np.sqrt(table.kl.astype(float).clip(lower=1e-3)),
    )


def path_of(row: pd.Series) -> list[tuple[float, float]]:
    """Return (KL, reward) of the SFT model and of every checkpoint in order."""
    ends = [*(f"_{step}" for step in TASKS[row.task].steps[:-1]), ""]
    return [(0.0, float(row.sft_reward)), *((float(row[f"kl{e}"]), float(row[f"reward{e}"])) for e in ends)]


# --- the work -----------------------------------------------------------------------------------------------


def make_sft_model(task_and_seed: tuple[str, int]) -> None:
    """Do what the runs of a seed share, unless it is done."""
    task, seed = task_and_seed
    commands, folder = TASKS[task].sft(seed), TASKS[task].folder(seed)
    if commands and not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run of minutes needs no resume
        do(commands, folder.with_suffix(".log"))
        (folder / "done").touch()


def make_row(run: Run) -> dict[str, object]:
    """Train and sample a run, and return its row; its models and checkpoints are deleted."""
    started = time.perf_counter()
    shutil.rmtree(run.folder, ignore_errors=True)
    do(TASKS[run.task].commands(run), run.folder.with_name(f"{run.folder.name}.log"))
    row = asdict(run) | {"processor": processor()} | measured(run) | {"seconds": time.perf_counter() - started}
    for folder in (*run.folder.glob("model-*"), *run.folder.glob("checkpoints")):
        shutil.rmtree(folder)
    return row


def measured(run: Run) -> dict[str, float]:
    """Return the figures of a finished run."""
    read = read_run(run.folder, run.arm)

    def last(tag: str) -> float:
        value = read.last(tag)
        return math.nan if value is None else value

    beta, clamped = read.curves["beta/used"], read.curve("beta/clamped")
    return {
        "accuracy": last("val/reward_accuracy"),
        "log_ratio_chosen": last("val/log_ratio_chosen"),
        "log_ratio_rejected": last("val/log_ratio_rejected"),
        "beta_low": float(beta.min()),
        "beta_high": float(beta.max()),
        "clamped": math.nan if clamped is None else float(clamped.values.mean()),
        "gap": last("gap/mean"),
        **TASKS[run.task].figures(run, read),
    }


def do(commands: Sequence[Command], log: Path) -> None:
    """Run `beta-dpo` commands one after the other in this process, so that its start-up is paid once."""
    torch.set_num_threads(1)
    with quietly(log):
        for command in commands:
            print(spoken(command), flush=True)
            OWN[command[0]](command[1:]) if command[0] in OWN else main(command)


def spoken(command: Command) -> str:
    """Return a command as a reader gives it in the project's folder."""
    own = command[0] in OWN
    program = ["python", "-m", f"benchmarks.study.{command[0]}"] if own else ["beta-dpo", command[0]]
    return shlex.join([*program, *command[1:]])


@contextlib.contextmanager
def quietly(log: Path) -> Iterator[None]:
    """Redirect all output of this process to a file, including output from outside Python."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)
