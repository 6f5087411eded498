"""The work of the study: it does a run with the commands a reader would give, and measures the result."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from app.commands.judge import summary, win_rate
from app.main import main
from app.report.run import read_run
from app.samples import read_samples
from benchmarks.study.runs import FOLDER, STEPS, Command, StudyRun, sft_commands, sft_folder


def make_sft_model(seed: int) -> None:
    """Train, export and sample the SFT model of a seed, unless its samples exist."""
    folder = sft_folder(seed)
    if not (folder / "samples.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run of a minute needs no resume
        with quietly(FOLDER / "logs" / f"{seed}-sft.log"):
            do(sft_commands(seed))


def make_row(run: StudyRun, phase: str) -> dict[str, object]:
    """Train, export and sample a run, and return its row; its models and checkpoints are deleted."""
    started = time.perf_counter()
    shutil.rmtree(run.folder, ignore_errors=True)
    with quietly(FOLDER / "logs" / f"{run.seed}-{run.name}.log"):
        do(run.commands())
    row = {"phase": phase, **run.settings(), **measured(run), "seconds": time.perf_counter() - started}
    for step in STEPS:
        shutil.rmtree(run.model(step))
    shutil.rmtree(run.folder / "checkpoints")
    return row


def do(commands: Sequence[Command]) -> None:
    """Run `beta-dpo` commands one after the other in this process, so that its start-up is paid once."""
    torch.set_num_threads(1)
    for command in commands:
        print("beta-dpo", *command, flush=True)
        main(command)


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


def measured(run: StudyRun) -> dict[str, float]:
    """Return the figures of a finished run."""
    read = read_run(run.folder, run.name)
    rivals = [row for _, row in read_samples(str(sft_folder(run.seed) / "samples.jsonl"))]
    sft = summary(rivals)
    found: dict[str, float] = {
        "sft_reward": sft["mean true reward"].mean,
        "sft_malformed": sft["malformed share"].mean,
        "accuracy": last(read, "val/reward_accuracy"),
        "log_ratio_chosen": last(read, "val/log_ratio_chosen"),
        "log_ratio_rejected": last(read, "val/log_ratio_rejected"),
    }
    for step in STEPS:
        answers = [row for _, row in read_samples(str(run.samples(step)))]
        told, end = summary(answers), "" if step == STEPS[-1] else f"_{step}"
        found |= {
            f"reward{end}": told["mean true reward"].mean,
            f"malformed{end}": told["malformed share"].mean,
            f"kl{end}": told["KL to the reference"].mean,
        }
    found["win_rate"] = win_rate(answers, rivals).mean
    beta, clamped = read.curves["beta/used"].values, read.curve("beta/clamped")
    found |= {
        "beta_low": float(beta.min()),
        "beta_high": float(beta.max()),
        "clamped": float("nan") if clamped is None else float(clamped.values.mean()),
    }
    assert read.audit is not None
    flipped = read.audit.flipped.to_numpy(bool)
    for name, mask in {"flipped": flipped, "clean": ~flipped}.items():
        rows = read.audit[mask]
        found[f"dropped_{name}"] = float(1 - rows.kept.mean()) if len(rows) else float("nan")
    return found


def last(read: Any, tag: str) -> float:
    value = read.last(tag)
    return float("nan") if value is None else value
