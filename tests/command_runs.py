"""Small runs by the real command, in processes of their own that may be ended at any moment."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from app.main import main

ROOT = Path(__file__).parents[1]
STEPS = 24
LIMIT_SECONDS = 900  # generous: only to end a hang
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["app.cli.dispatch", "command_runs"])


def write_config(folder: Path, model: str, version: str | None = "", **data: Any) -> None:
    """`config.yaml` of a β-DPO run: five steps an epoch, a checkpoint every two, validation every three."""
    source: dict[str, Any] = {"class_path": "datamodules.ControlledTask"}
    source["init_args"] = {"pairs": 43, "validation_pairs": 7, "test_pairs": 7, "batch_size": 10} | data
    if "path" in data:
        source = {"class_path": "datamodules.PreferenceData", "init_args": data}
    logger = {"save_dir": "runs", "name": "run"} | ({} if version is None else {"version": version})
    slots = {
        "statistics": {},
        "filter": {"keep_ratio": 0.6},
        "schedule": {},
        "audit": {"every_n_steps": 3},
        "checkpoint": {"every_n_steps": 2},
        "dashboard": None,
        "health": None,
    }
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-3}}
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "max_epochs": 99,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 1,
        "val_check_interval": 3,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        "callbacks": [{"class_path": "injected_faults.InjectedFault"}],
    }
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "lightning_modules.PreferenceOptimization",
            "init_args": {"name": model, "optimizer": optimizer},
        },
        "data": source,
        "trainer": trainer,
        **slots,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def environment(fault: str = "", **more: str) -> dict[str, str]:
    """The environment of a process under test; `fault` is for `injected_faults.InjectedFault`."""
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places, "FAULT": fault, **more}


def fresh_command(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`beta-dpo ARGUMENTS` in `folder` as a user starts it: Lightning starts the other ranks."""
    line = [sys.executable, "-m", "app.main", *arguments]
    settings: dict[str, Any] = {"cwd": folder, "env": environment(**more), "timeout": LIMIT_SECONDS}
    return subprocess.run(line, **settings, capture_output=True, text=True, check=False)


def command(folder: Path, *arguments: str, fault: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """`beta-dpo ARGUMENTS` in `folder`, with `more` in its environment.

    The processes are forks (see `begin`): importing the program takes longer than most runs. Of several ranks the
    status is that of the first. Where libraries read `more` as they are imported, it is a `fresh_command`.
    """
    if any(name != "PYTHONPATH" and not name.startswith("BETA_DPO_") for name in more):
        return fresh_command(folder, *arguments, FAULT=fault, **more)
    ranks = int(dict(pairwise(arguments)).get("--trainer.devices", 1))
    with tempfile.TemporaryDirectory() as logs:
        work = partial(main_in, folder, arguments)
        status, *_ = ended(begin(work, environment(fault, **more), Path(logs), ranks))
        said = [
            "".join(file.read_text() for file in sorted(Path(logs).glob(f"*.{name}"))) for name in ("out", "err")
        ]
    return subprocess.CompletedProcess(["beta-dpo", *arguments], status, *said)


def main_in(folder: Path, arguments: Sequence[str]) -> None:
    os.chdir(folder)
    sys.argv = ["beta-dpo", *arguments]
    main(arguments)


def begin(work: Callable[[], None], variables: dict[str, str], logs: Path, ranks: int = 1) -> list[Any]:
    """Start `work` in as many forks of one process that has imported the program, with LOGS/RANK.out and .err.

    Several are told to be the ranks of one run on this machine, as a launcher would tell them.
    """
    places: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        places = [shared | {"LOCAL_RANK": str(rank)} for rank in range(ranks)]
    started = []
    for rank, place in enumerate(places):
        settings = (work, variables | place, logs / f"{rank}.out", logs / f"{rank}.err")
        started.append(FORKS.Process(target=fork, args=settings))
        started[-1].start()
    return started


def fork(work: Callable[[], None], variables: dict[str, str], *said: Path) -> None:
    """Be one of the processes: its output, its environment, and what a start would have read there."""
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = variables["PYTHONPATH"].split(os.pathsep)
    torch.set_num_threads(1)
    work()


def ended(processes: Sequence[Any]) -> list[int]:
    """The statuses of the processes, once they have ended."""
    try:
        for process in processes:
            process.join(LIMIT_SECONDS)
        assert all(process.exitcode is not None for process in processes), f"no end in {LIMIT_SECONDS} s"
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def run_ranks(script: Path, *arguments: str, logs: Path, ranks: int = 2) -> None:
    """Run `python SCRIPT ARGUMENTS` as `ranks` ranks; fails with the end of their logs unless all end well."""
    codes = ended(begin(partial(run_script, script, arguments), environment(), logs, ranks))
    assert codes == [0] * ranks, "\n".join((logs / f"{rank}.err").read_text()[-3000:] for rank in range(ranks))


def run_script(script: Path, arguments: Sequence[str]) -> None:
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def refusal(arguments: Sequence[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command here that must be refused; return its one sentence, which is the last line of stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    shown = capfd.readouterr().err
    assert stop.value.code == 2, shown
    assert "Traceback" not in shown
    sentences = [line for line in shown.splitlines() if line.startswith("beta-dpo: ")]
    assert len(sentences) == 1, shown
    assert sentences[0] == shown.splitlines()[-1]
    return sentences[0].removeprefix("beta-dpo: ")


def fit(folder: Path, fault: str = "", *options: str) -> subprocess.CompletedProcess[str]:
    """The one command that starts the run and, the same, goes on with it."""
    return command(folder, "fit", "--config", "config.yaml", "--ckpt_path", "last", *options, fault=fault)


def audit_of(run: Path) -> pa.Table:
    """All rows, in the order of the steps; fails when a pair stands twice in a step."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted((run / "audit").glob("*.parquet"))])
    places = list(zip(table["step"].to_pylist(), table["pair_id"].to_pylist(), strict=True))
    assert len(set(places)) == len(places)
    return table


def assert_same_run(one: Path, other: Path) -> None:
    """Equal audits, and equal weights, optimizer, statistics and sampler in the last checkpoint, to the bit."""
    assert audit_of(one).equals(audit_of(other))
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    assert states[0]["global_step"] == states[1]["global_step"]
    for state in states:  # of the loops only the sampler: they also count validations, which a kill may cut short
        state["sampler"] = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "sampler"):
        for left, right in zip(*(flat(state[part]) for state in states), strict=True):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, part
    for name in ("RewardGapStatistics", "PairFilter"):
        assert states[0]["callbacks"][name] == states[1]["callbacks"][name]


def flat(state: Any) -> list[Any]:
    """The leaves of nested dicts and lists, in order."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in [key, *flat(state[key])]]
    return [leaf for item in state for leaf in flat(item)] if isinstance(state, (list, tuple)) else [state]
