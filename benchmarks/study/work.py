"""Doing a run of the study, by the commands a reader would give, and measuring what came out."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.main import main
from app.report.run import read_run
from benchmarks.study.runs import FOLDER, STEPS, Command, StudyRun, sft_commands, sft_folder
from datamodules.controlled_task import is_well_formed, true_reward


def make_sft_model(seed: int) -> None:
    """Train, export and sample the SFT model of a seed, if that is not done yet."""
    folder = sft_folder(seed)
    if not (folder / "samples.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted try: a minute is not worth a resume
        with quietly(FOLDER / "logs" / f"{seed}-sft.log"):
            do(sft_commands(seed))


def make_row(run: StudyRun, phase: str) -> dict[str, object]:
    """Train, export and sample a run, and return its row. Only its samples, curves and audit stay on disk."""
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
    """What `beta-dpo COMMAND …` does, one after the other, in this process: its start-up is paid once."""
    torch.set_num_threads(1)
    for command in commands:
        print("beta-dpo", *command, flush=True)
        main(command)


@contextlib.contextmanager
def quietly(log: Path) -> Iterator[None]:
    """Everything that is printed, by this process and from below Python, goes to a file."""
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
    """The figures of a finished run."""
    read = read_run(run.folder, run.name)
    rivals = rewards(samples := read_samples(sft_folder(run.seed) / "samples.jsonl"))
    found: dict[str, float] = {
        "sft_reward": float(rivals.mean()),
        "sft_malformed": malformed(samples),
        "accuracy": last(read, "val/reward_accuracy"),
        "log_ratio_chosen": last(read, "val/log_ratio_chosen"),
        "log_ratio_rejected": last(read, "val/log_ratio_rejected"),
    }
    for step in STEPS:
        rows = read_samples(run.samples(step))
        end = "" if step == STEPS[-1] else f"_{step}"
        found |= {
            f"reward{end}": float((earned := rewards(rows)).mean()),
            f"malformed{end}": malformed(rows),
            f"kl{end}": float(np.mean([row["logp"] - row["reference_logp"] for row in rows])),
        }
    found["win_rate"] = float(((1 + np.sign(earned - rivals)) / 2).mean())
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


def read_samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rewards(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """The true reward of every answer."""
    return np.array([true_reward(row["prompt"], row["response"]) for row in rows])


def malformed(rows: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([not is_well_formed(row["prompt"], row["response"]) for row in rows]))
