"""The work of the study: what makes the row of a run, and many runs at a time."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import shlex
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from app.commands.judge import figures, win_rate
from app.core.samples import read_samples
from app.judges.rewards import OwnReward, TrueReward
from app.main import main
from app.report.run import read_run
from benchmarks.study import real_pairs
from benchmarks.study.plan import TASKS, Run, Task
from benchmarks.study.table import append_result
from benchmarks.tables import processor

TAGS = {
    "accuracy": "val/reward_accuracy",
    "log_ratio_chosen": "val/log_ratio_chosen",
    "log_ratio_rejected": "val/log_ratio_rejected",
    "gap": "gap/mean",
}


def make_shared(task: Task) -> None:
    """Do what all seeds of a task share."""
    if lost := [name for name in map(os.path.expandvars, task.needs) if not Path(name).exists()]:
        raise SystemExit(
            f"real pairs need {', '.join(lost)}: make the model by `make smollm2`, and name the folder of the "
            "pairs by PAIRS=FOLDER"
        )
    for command in task.once:
        call(command.format(task=task))


def make_sft_model(run: Run) -> None:
    """Do what the runs of a seed share, unless it is done."""
    commands, done = run.preparing(), run.sft / "done"
    if commands and not done.exists():
        shutil.rmtree(run.sft, ignore_errors=True)  # an interrupted run of minutes needs no resume
        do(commands, run.sft.with_suffix(".log"))
        done.touch()


def make_row(run: Run) -> dict[str, Any]:
    """Train and sample a run, and return its row; its models and checkpoints are deleted."""
    started = time.perf_counter()
    shutil.rmtree(run.folder, ignore_errors=True)
    do(run.commands(), Path(f"{run.folder}.log"))
    row = asdict(run) | {"processor": processor()} | measured(run) | {"seconds": time.perf_counter() - started}
    for folder in (*run.folder.glob("model-*"), *run.folder.glob("checkpoints")):
        shutil.rmtree(folder)
    return row


def measured(run: Run) -> dict[str, float]:
    """Return the figures of a finished run."""
    read, task = read_run(run.folder, run.arm), TASKS[run.task]
    beta, clamped, audit = read.curves["beta/used"], read.curves.get("beta/clamped"), read.audit
    assert audit is not None
    flipped = audit.flipped.to_numpy(bool)
    found = {
        **pd.Series({name: read.last(tag) for name, tag in TAGS.items()}, dtype=float),  # NaN where not logged
        "beta_low": float(beta.min()),
        "beta_high": float(beta.max()),
        "clamped": math.nan if clamped is None else float(clamped.mean()),
        "dropped_flipped": float(1 - audit.kept[flipped].mean()),  # NaN without such pairs
        "dropped_clean": float(1 - audit.kept[~flipped].mean()),
    }
    if not task.steps:
        return found | real_pairs.found(audit, Path(f"{run.folder}-pairs", "train.jsonl"))
    of_sft = list(read_samples(f"{run.sft}/samples.jsonl"))
    sft = score(task, of_sft)
    found |= {"sft_reward": sft["reward"], "sft_malformed": sft["malformed"]}
    for step in run.sampled:
        end = "" if step == task.steps[-1] else f"_{step}"
        samples = list(read_samples(f"{run.folder}/samples-{step}.jsonl"))
        found |= {f"{name}{end}": value for name, value in score(task, samples).items()}
    return found if task.reward else found | {"win_rate": win_rate(samples, of_sft).mean}


def score(task: Task, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Return mean reward, share of malformed or unfinished responses, and KL of samples (0 where it is unknown)."""
    judge = OwnReward(task.reward, dict(task.reward_args)) if task.reward else TrueReward()
    told = {name: found.mean for name, found in figures(samples, judge).items()}
    reward, finished = told["reward" if task.reward else "true reward"], told.get("finished", 1.0)
    return {"reward": reward, "malformed": told.get("malformed", 1 - finished), "kl": told.get("KL", 0.0)}


def do(commands: Sequence[str], log: Path) -> None:
    """Run commands in this process, so that its start-up is paid once; all output, also from C, goes to `log`."""
    torch.set_num_threads(1)
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = {number: os.dup(number) for number in (1, 2)}
    with open(log, "w", encoding="utf-8") as file:
        try:
            for number in kept:
                os.dup2(file.fileno(), number)
            for command in commands:
                print(command, flush=True)
                call(command)
        finally:
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)


def call(command: str) -> None:
    program, *words = map(os.path.expandvars, shlex.split(command))
    if program == "beta-dpo":
        main(words)
    else:  # python -m MODULE
        importlib.import_module(words[1]).main(words[2:])


def carry_out(runs: list[Run], jobs: int) -> set[Run]:
    """Do runs, `jobs` at a time, and save the row of each as soon as it is done. Return those that failed."""
    for task in dict.fromkeys(run.task for run in runs):
        make_shared(TASKS[task])
    print(f"{len(runs)} runs to do", flush=True)
    # fork imports the libraries only once; one process per run, so that a run leaves no state to another
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        # all SFT models first, or two runs of a seed would wait for the same one
        without = set()
        first = {run.sft: run for run in runs}
        for run, _, error in pool.imap_unordered(partial(attempt, make_sft_model), first.values()):
            if error:
                without.add(run.sft)
                print(f"no SFT model of {run.task}, seed {run.seed}: its runs are left out\n{error}", flush=True)
        failed = {run for run in runs if run.sft in without}
        runs = [run for run in runs if run not in failed]
        started = time.monotonic()
        for number, (run, row, error) in enumerate(pool.imap_unordered(partial(attempt, make_row), runs), 1):
            if error:
                failed.add(run)
                shown = f"failed:\n{error}"
            else:
                append_result(row)
                shown = f"reward {row['reward']:.2f}" if "reward" in row else f"accuracy {row['accuracy']:.2f}"
            left = (time.monotonic() - started) / number * (len(runs) - number) / 60
            print(f"{number}/{len(runs)}, about {left:.0f} min left: {run}: {shown}", flush=True)
    return failed


def attempt(make: Callable[[Run], Any], run: Run) -> tuple[Run, Any, str]:
    """Return the run, what is made of it, and the error, which neither ends the others nor hangs the pool."""
    try:
        return run, make(run), ""
    except (Exception, SystemExit):
        return run, None, traceback.format_exc(limit=-3)
