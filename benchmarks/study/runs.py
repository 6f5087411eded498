"""The work of the study: what makes the row of a run, and many runs at a time."""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import shlex
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.main import main
from app.report.run import read_run
from benchmarks.study.table import append_result
from benchmarks.study.tasks import TASKS, Run
from benchmarks.tables import processor

TAGS = {
    "accuracy": "val/reward_accuracy",
    "log_ratio_chosen": "val/log_ratio_chosen",
    "log_ratio_rejected": "val/log_ratio_rejected",
    "gap": "gap/mean",
}


def make_sft_model(task_and_seed: tuple[str, int]) -> None:
    """Do what the runs of a seed share, unless it is done."""
    task, seed = task_and_seed
    commands, folder = TASKS[task].sft(seed), TASKS[task].folder(seed)
    if commands and not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run of minutes needs no resume
        do(commands, folder.with_suffix(".log"))
        (folder / "done").touch()


def make_row(run: Run) -> dict[str, Any]:
    """Train and sample a run, and return its row; its models and checkpoints are deleted."""
    started = time.perf_counter()
    shutil.rmtree(run.folder, ignore_errors=True)
    do(TASKS[run.task].commands(run), Path(f"{run.folder}.log"))
    row = asdict(run) | {"processor": processor()} | measured(run) | {"seconds": time.perf_counter() - started}
    for folder in (*run.folder.glob("model-*"), *run.folder.glob("checkpoints")):
        shutil.rmtree(folder)
    return row


def measured(run: Run) -> dict[str, float]:
    """Return the figures of a finished run."""
    read = read_run(run.folder, run.arm)
    last = {name: read.last(tag) for name, tag in TAGS.items()}
    beta, clamped = read.curves["beta/used"], read.curves.get("beta/clamped")
    return {
        **{name: math.nan if value is None else value for name, value in last.items()},
        "beta_low": float(beta.min()),
        "beta_high": float(beta.max()),
        "clamped": math.nan if clamped is None else float(clamped.mean()),
        **TASKS[run.task].figures(run, read.audit),
    }


def do(commands: Sequence[str], log: Path) -> None:
    """Run commands one after the other in this process, so that its start-up is paid once; output goes to `log`."""
    torch.set_num_threads(1)
    with quietly(log):
        for command in commands:
            print(command, flush=True)
            program, *words = shlex.split(command)
            if program == "beta-dpo":
                main(words)
            else:  # python -m MODULE
                importlib.import_module(words[1]).main(words[2:])


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


def carry_out(runs: list[Run], jobs: int) -> set[Run]:
    """Do runs, `jobs` at a time, and save the row of each as soon as it is done. Return those that failed."""
    for task in dict.fromkeys(run.task for run in runs):
        TASKS[task].prepare()
    print(f"{len(runs)} runs to do", flush=True)
    # fork imports the libraries only once; one process per run, so that a run leaves no state to another
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        # all SFT models first, or two runs of a seed would wait for the same one
        models = {TASKS[run.task].folder(run.seed): (run.task, run.seed) for run in runs}
        without = set()
        for (task, seed), _, error in pool.imap_unordered(partial(attempt, make_sft_model), models.values()):
            if error:
                without.add(TASKS[task].folder(seed))
                print(f"no SFT model of {task}, seed {seed}: its runs are left out\n{error}", flush=True)
        failed = {run for run in runs if TASKS[run.task].folder(run.seed) in without}
        runs = [run for run in runs if run not in failed]
        started = time.monotonic()
        for number, (run, row, error) in enumerate(pool.imap_unordered(partial(attempt, make_row), runs), 1):
            left = (time.monotonic() - started) / number * (len(runs) - number) / 60
            if error:
                failed.add(run)
                shown = f"failed:\n{error}"
            else:
                append_result(row)
                shown = f"reward {row['reward']:.2f}" if "reward" in row else f"accuracy {row['accuracy']:.2f}"
            print(f"{number}/{len(runs)}, about {left:.0f} min left: {told(run)}: {shown}", flush=True)
    return failed


def attempt(make: Callable[[Any], Any], what: Any) -> tuple[Any, Any, str]:
    """Return `what`, what is made of it, and the error, which neither ends the others nor hangs the pool."""
    try:
        return what, make(what), ""
    except (Exception, SystemExit):
        return what, None, traceback.format_exc(limit=-3)


def told(run: Run) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else f"{value}" for value in astuple(run)).rstrip()
