"""The command `beta-dpo quickstart`, which runs all stages on the controlled task, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    with ThreadPoolExecutor(len(ARMS)) as workers:
        try:
            all_stages(seed, folder, workers)
        except BaseException:  # also of a signal: no command may go on without this one
            for child in RUNNING:
                child.terminate()
            for child in RUNNING:
                child.wait()
            raise
    print(f"curves of β, gaps and rewards: tensorboard --logdir {folder}   (then open http://localhost:6006)")


def all_stages(seed: int, folder: Path, workers: ThreadPoolExecutor) -> None:
    """Train and sample the SFT model, then both arms beside each other, and compare them in a page."""
    start, rival = train("sft", seed, folder, "--config", "quickstart_sft"), str(folder / "sft-samples.jsonl")
    command("generate", start, rival, "--seed", str(seed), *LENGTH)
    print(f"plain DPO, for comparison, runs on the other core: {folder / 'dpo.log'}", flush=True)

    def train_arm(arm: str) -> None:
        log = None if arm == ARMS[0] else folder / f"{arm}.log"
        words = ("--config", "quickstart", "--config", f"method/{arm}", "--model.name", start)
        model, samples = train(arm, seed, folder, *words, log=log), str(folder / arm / "samples.jsonl")
        command("generate", model, samples, "--reference", start, "--seed", str(seed), *LENGTH, log=log)

    list(workers.map(train_arm, ARMS))
    runs, page = [str(folder / arm) for arm in ARMS], str(folder / "report.html")
    command("report", *runs, "--baseline", rival, "--out", page)


def train(name: str, seed: int, folder: Path, *words: str, log: Path | None = None) -> str:
    """Run `fit` into `folder/name`, export its last checkpoint to `folder/name-model`, and return that."""
    logger, model = f"{{save_dir: {folder}, name: {name}, version: ''}}", str(folder / f"{name}-model")
    command("fit", *words, "--trainer.logger.init_args", logger, "--seed_everything", str(seed), log=log)
    command("export", str(folder / name / "checkpoints" / "last.ckpt"), model, log=log)
    return model


def command(*words: str, log: Path | None = None) -> None:
    """Run one `beta-dpo` command on one core. Raises UserError if it fails."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(log or os.devnull, "a", encoding="utf-8") as file:
        target = None if log is None else file
        line = [sys.executable, "-m", "app.main", *words]
        RUNNING.append(child := subprocess.Popen(line, env=environment, stdout=target, stderr=target))
        status = child.wait()
    if status:
        told = "its message is above" if log is None else f"its message ends {log}"
        raise UserError(f"quickstart: `beta-dpo {words[0]}` failed with status {status}: {told}.")
