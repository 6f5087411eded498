"""The study's illustration with a real model on real pairs: a few steps of SmolLM2-135M on Anthropic-HH.

    python -m benchmarks.study.smollm2 hh_harmless_base_test.jsonl.gz

It takes a few minutes on two cores. It shows how β and the gaps move; so few steps cannot decide a claim.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import time
from pathlib import Path

import pandas as pd

from app.files import atomic_file
from app.report.run import read_run
from benchmarks.study.runs import FOLDER, Command
from benchmarks.study.table import RESULTS
from benchmarks.study.work import do, last, quietly

TABLE = RESULTS.with_name("smollm2.csv")
ARMS = ("dpo", "beta_dpo")
SEEDS = (1, 2)
STEPS = 6


def command(arm: str, seed: int, data: str) -> Command:
    """Return the arguments of `beta-dpo` that train an arm."""
    return [
        *("fit", "--config", "configs/smollm2_hh.yaml", "--config", f"configs/method/{arm}.yaml"),
        *("--data.path", data, "--seed_everything", str(seed), "--trainer.max_steps", str(STEPS)),
        *("--trainer.val_check_interval", str(STEPS)),
        *("--trainer.logger.init_args.save_dir", str(FOLDER), "--trainer.logger.init_args.name", name(arm, seed)),
        *("--trainer.logger.init_args.version", ""),
    ]


def name(arm: str, seed: int) -> str:
    return f"smollm2-{arm}-{seed}"


def row(task: tuple[str, int, str]) -> dict[str, object]:
    """Train an arm and return its figures."""
    arm, seed, _ = task
    started, folder = time.perf_counter(), FOLDER / name(arm, seed)
    shutil.rmtree(folder, ignore_errors=True)
    with quietly(FOLDER / "logs" / f"{name(arm, seed)}.log"):
        do([command(*task)])
    run = read_run(folder, arm)
    beta, gap = run.curves["beta/used"].values, run.curves["gap/mean"].values
    shutil.rmtree(folder / "checkpoints")
    return {
        "arm": arm,
        "seed": seed,
        "steps": STEPS,
        "pairs": int(last(run, "val/pairs")),
        "accuracy": last(run, "val/reward_accuracy"),
        "gap_first": float(gap[0]),
        "gap_last": float(gap[-1]),
        "log_ratio_chosen": last(run, "val/log_ratio_chosen"),
        "log_ratio_rejected": last(run, "val/log_ratio_rejected"),
        "beta_low": float(beta.min()),
        "beta_high": float(beta.max()),
        "seconds": time.perf_counter() - started,
    }


def section(table: pd.DataFrame) -> str:
    """Return the section of docs/study.md on this illustration."""
    lines = [
        "| arm | seed | β, lowest–highest | mean gap, last step | accuracy held out | log-ratio chosen, rejected |",
        "|" + "---|" * 6,
    ]
    lines += [
        f"| {one.arm} | {one.seed} | {one.beta_low:.3f}–{one.beta_high:.3f} | {one.gap_last:+.2f} "
        f"| {one.accuracy:.2f} | {one.log_ratio_chosen:+.2f}, {one.log_ratio_rejected:+.2f} |"
        for one in table.itertuples()
    ]
    told = (
        f"SmolLM2-135M-Instruct, {table.steps.iloc[0]} steps of eight pairs of Anthropic-HH (harmless), β0 = 0.1, "
        f"{table.pairs.iloc[0]} pairs held out; `configs/smollm2_hh.yaml`. An illustration: so few steps and pairs "
        "decide nothing."
    )
    return "\n\n".join(["## The same with a real model, as an illustration", told, "\n".join(lines)])


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).exists():
        sys.exit("give the file of Anthropic-HH pairs: python -m benchmarks.study.smollm2 pairs.jsonl.gz")
    if not Path("models/smollm2").is_dir():
        sys.exit("models/smollm2 is missing: `make smollm2` fetches it")
    tasks = [(arm, seed, sys.argv[1]) for seed in SEEDS for arm in ARMS]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        table = pd.DataFrame(pool.map(row, tasks, chunksize=1))
    with atomic_file(TABLE) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    print(table.to_string())


if __name__ == "__main__":
    main()
