"""The command `beta-dpo quickstart`, which runs all stages on the controlled task, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from app.cli.mistakes import checked_command
from app.core.errors import UserError
from app.method.ranges import Seed

LENGTH = ("--max_new_tokens", "32")  # more than the longest true answer
ARMS = ("beta_dpo", "dpo")  # the first prints here, the others to a log
RUNNING: list[subprocess.Popen[bytes]] = []  # and those that have ended


@checked_command
def quickstart(seed: Seed = 1, out: str = "runs/quickstart") -> None:
    """Train SFT, then β-DPO and plain DPO from it, on a task with known rewards; print a table and write a page.

    Takes a few minutes on two CPU cores. An earlier run in `out` is moved aside, not overwritten.

    Args:
        seed: seed of data, training and samples.
        out: folder of the runs, models, samples and of report.html.
    """
    folder = Path(out)
    if folder.exists():
        if not (folder / "sft").is_dir():  # not to move away what is none of its own
            raise UserError(f"out: {out} is there and holds no quickstart: name a folder that is not there.")
        aside = folder.with_name(f"{folder.name}-before-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(aside)
        number = len(list(folder.parent.glob(f"{folder.name}-before-*")))
        print(f"the earlier {folder} is now {aside}, one of {number} that you may delete: rm -r {folder}-before-*")
    start, rival = folder / "sft-model", folder / "sft-samples.jsonl"
    train("quickstart_sft", "sft", start, [], seed, folder)
    command("generate", str(start), str(rival), "--seed", str(seed), *LENGTH)
    print(f"plain DPO, for comparison, runs on the other core: {folder / 'dpo.log'}", flush=True)
    with ThreadPoolExecutor(len(ARMS)) as workers, ending_commands():
        list(workers.map(lambda arm: train_arm(arm, start, seed, folder), ARMS))
    runs, page = [str(folder / arm) for arm in ARMS], str(folder / "report.html")
    command("report", *runs, "--baseline", str(rival), "--out", page)
    print(f"curves of β, gaps and rewards: tensorboard --logdir {folder}   (then open http://localhost:6006)")


def train_arm(arm: str, start: Path, seed: int, folder: Path) -> None:
    """Train one file of configs/method from the SFT model and sample from the result."""
    log = None if arm == ARMS[0] else folder / f"{arm}.log"
    model = folder / f"{arm}-model"
    words = ["--config", f"method/{arm}", "--model.name", str(start)]
    train("quickstart", arm, model, words, seed, folder, log)
    samples = str(folder / arm / "samples.jsonl")
    command("generate", str(model), samples, "--reference", str(start), "--seed", str(seed), *LENGTH, log=log)


def train(
    config: str, name: str, model: Path, words: list[str], seed: int, folder: Path, log: Path | None = None
) -> None:
    """Run `fit` into `folder/name` and export its last checkpoint to the folder `model`."""
    fit(config, name, words, seed, folder, log)
    command("export", str(folder / name / "checkpoints" / "last.ckpt"), str(model), log=log)


def fit(config: str, name: str, words: list[str], seed: int, folder: Path, log: Path | None = None) -> None:
    logger = f"{{save_dir: {folder}, name: {name}, version: ''}}"
    words = [*words, "--trainer.logger.init_args", logger, "--seed_everything", str(seed)]
    command("fit", "--config", config, *words, log=log)


@contextmanager
def ending_commands() -> Iterator[None]:
    """If the block fails or is interrupted, send SIGTERM to all commands and wait until they have ended."""
    try:
        yield
    except BaseException:
        for child in RUNNING:
            child.terminate()
        for child in RUNNING:
            child.wait()
        raise


def command(*words: str, log: Path | None = None) -> None:
    """Run one `beta-dpo` command on one core. Raises UserError if it fails."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(log or os.devnull, "a", encoding="utf-8") as file, ending_commands():
        target = None if log is None else file
        child = subprocess.Popen(
            [sys.executable, "-m", "app.main", *words], env=environment, stdout=target, stderr=target
        )
        RUNNING.append(child)
        status = child.wait()
    if status:
        told = "its message is above" if log is None else f"its message ends {log}"
        raise UserError(f"quickstart: `beta-dpo {words[0]}` failed with status {status}: {told}.")
