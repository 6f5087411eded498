"""A log folder belongs to one run: other runs are kept out, and its curves outlive every resume."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command_runs import LIMIT_SECONDS, begin, environment, fit, main_in, write_config
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tiny_runs import controlled, preference, quiet_trainer

from app.cli.run_record import continue_newest_version
from app.core import files as locks
from app.core.errors import UserError
from app.core.files import Lock, locked
from app.core.log_folder import ContinuedTable, claimed_log_folder, continue_curves, log_folder
from app.report.run import read_csv, read_curves
from callbacks import RunCheckpoint

RUN = Path("runs") / "run"


@pytest.mark.parametrize("kernel", [True, False])
def test_a_lock_names_its_holder(kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "has_kernel_locks", lambda folder: kernel)
    file = tmp_path / "new" / "thing.lock"
    with (
        locked(file, "The thing", "name another"),
        pytest.raises(UserError, match=r"The thing is in use by process \d+ on .*, or name another\."),
        locked(file, "The thing", "name another", waits=False),
    ):
        pass
    # a process that is gone has no lock, whatever its file says
    file.write_text("999999999\nelsewhere\n" if kernel else f"999999999\n{locks.socket.gethostname()}\n")
    lock = Lock(file, "The thing", "name another")
    assert lock.acquire(0)
    lock.release()
    # without the kernel's locks nobody can tell whether the process of another machine is gone
    file.write_text("1\nelsewhere\n")
    assert lock.acquire(0.1) == kernel
    assert ("if it is gone, remove" in lock.holder()) != kernel


def test_a_second_run_is_refused_and_a_killed_one_goes_on_with_its_curves(tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    tensorboard = config["trainer"]["logger"]
    csv = tensorboard | {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    config["trainer"]["logger"] = [csv, tensorboard]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    work = partial(main_in, tmp_path, ("fit", "--config", "config.yaml"))
    (first,) = begin(work, environment(fault="slow 20@7"), tmp_path)
    try:
        until = time.monotonic() + LIMIT_SECONDS
        while not (tmp_path / RUN / "checkpoints" / "step=6.ckpt").exists() and time.monotonic() < until:
            time.sleep(0.2)
        second = fit(tmp_path)
    finally:
        first.kill()
    assert second.returncode == 2, second.stderr
    assert f"The log folder {RUN} is in use by process {first.pid} on " in second.stderr
    assert "choose another log folder" in second.stderr
    third = fit(tmp_path, "", "--trainer.max_steps", "14")
    assert third.returncode == 0, third.stderr
    run = tmp_path / RUN
    table, events = read_csv(run / "metrics.csv"), read_curves(run)
    for curves in (table, events):
        assert curves["train/loss"].index.tolist() == list(range(1, 15))
    assert table["train/loss"].values == pytest.approx(events["train/loss"].values, rel=1e-5)


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    with claimed_log_folder(quiet_trainer(tmp_path, logger=logger)):  # and nothing is trained
        logger.log_hyperparams({})
        logger.save()
    assert not list(tmp_path.iterdir())


def test_a_start_that_the_first_step_refuses_leaves_no_folder(tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    refused = fit(tmp_path, "", "--statistics", "null")
    assert refused.returncode == 2
    assert "PairFilter needs the running reward-gap statistics" in refused.stderr
    assert not (tmp_path / RUN).exists()


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_last_is_that_of_the_newest_training(kind: type[Logger], tmp_path: Path) -> None:
    def continued() -> str:
        logger: Any = kind(tmp_path)  # type: ignore[call-arg]
        continue_newest_version(SimpleNamespace(loggers=[logger]))  # type: ignore[arg-type]
        return Path(logger.log_dir).name

    places = [tmp_path / "lightning_logs" / f"version_{version}" for version in range(3)]
    assert continued() == "version_0"
    for place, record in zip(places, ("config.yaml", "config-validate.yaml", "metrics.csv"), strict=True):
        place.mkdir(parents=True)
        (place / record).touch()
    assert continued() == "version_2"  # a training that was killed before its first step
    shutil.rmtree(places[2])
    assert continued() == "version_0"
    shutil.rmtree(places[0])
    assert continued() == "version_2"  # none but an evaluation


def test_the_table_of_curves_is_continued(tmp_path: Path) -> None:
    first = ContinuedTable(str(tmp_path))
    for step in range(4):
        first.log_metrics({"train/loss": step / 2}, step)
    first.save()
    with open(first.path, "a") as file:
        file.write("4,1.")  # a kill cut the line short
    again = ContinuedTable(str(tmp_path))
    assert again.drop_from(3) == 1
    again.log_metrics({"train/loss": 9.0, "val/loss": 2.0}, 3)  # and a column that is new
    again.save()
    curves = read_csv(again.path)
    assert curves["train/loss"].values.tolist() == [0, 0.5, 1, 9]
    assert curves["val/loss"].index.tolist() == [3]
    again.path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not what CSVLogger writes"):
        ContinuedTable(str(tmp_path))


class Continue(Callback):
    """What the command does at the start of a resumed run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        continue_curves(trainer, resumes=True)


def test_curves_of_an_attempt_that_was_given_up_are_dropped(tiny_llama: str, tmp_path: Path) -> None:
    resume = None
    for steps in (6, 3):
        loggers: list[Logger] = [kind(tmp_path, name="", version="") for kind in (TensorBoardLogger, CSVLogger)]
        settings = {"logger": loggers, "log_every_n_steps": 1, "enable_checkpointing": True, "max_steps": steps}
        callbacks = [Continue(), RunCheckpoint(every_n_steps=2, keep_all=True)]
        trainer = quiet_trainer(tmp_path, callbacks, **settings)
        with claimed_log_folder(trainer):
            trainer.fit(preference(tiny_llama), controlled(80), ckpt_path=resume)
        resume = str(tmp_path / "checkpoints" / "step=2.ckpt")
    assert read_curves(tmp_path)["train/loss"].index.tolist() == [1, 2, 3]
    assert read_csv(tmp_path / "metrics.csv")["train/loss"].index.tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"already holds the curves of another run.* or resume that run"):
        continue_curves(trainer, resumes=False)


class SharedFolder(Logger):
    """A logger whose runs share a folder, as those of Weights & Biases do."""

    save_dir, name, version = "shared", "project", "one"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: object) -> None: ...


def test_runs_of_other_loggers_have_folders_of_their_own(tmp_path: Path) -> None:
    assert log_folder(quiet_trainer(tmp_path, logger=SharedFolder())) == Path("shared/project/one")
    assert log_folder(quiet_trainer(tmp_path)) == tmp_path
    logger = SharedFolder()
    logger.version = "job-1/beta0"
    with (
        pytest.raises(UserError, match="'job-1/beta0' is no run id, because it holds /: give one"),
        claimed_log_folder(quiet_trainer(tmp_path, logger=logger)),
    ):
        pass
