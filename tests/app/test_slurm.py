"""What SLURM says is taken as it is, or refused in one sentence, before any process waits for another."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from tiny_runs import quiet_trainer

from app.cli.slurm import check_processes, check_slurm
from app.core.errors import UserError

# as Slurm 22.05 sets them: in a batch script of two tasks on two nodes, and in each task that srun starts there
BATCH = {
    "SLURM_JOB_ID": "4440",
    "SLURM_JOB_NAME": "train",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
ONE = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}


def use(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], *without: str) -> None:
    for name, value in variables.items():
        if name not in without:
            monkeypatch.setenv(name, value)


def test_tasks_of_srun_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, STEP)
    check_slurm()
    assert SLURMEnvironment.detect()


def test_what_is_no_business_of_slurm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    check_slurm()
    # one process in an allocation; torchrun within a step
    use(monkeypatch, BATCH | {"SLURM_JOB_NAME": "interactive"})
    check_slurm()
    use(monkeypatch, STEP | {"SLURM_JOB_NAME": "bash"} | ONE)
    check_slurm()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    use(monkeypatch, STEP)
    check_slurm()


@pytest.mark.parametrize(
    ("variables", "without", "cure"),
    [
        (STEP | {"SLURM_JOB_NAME": "bash"}, (), "all 2 tasks .* another --job-name"),
        (STEP | {"SLURM_JOB_NAME": "interactive"}, (), "another --job-name"),
        (BATCH, (), "has 2 tasks, .* put srun before the command"),
        (STEP, ("SLURM_NTASKS_PER_NODE",), "use --ntasks-per-node"),
    ],
)
def test_tasks_that_lightning_would_misread_are_refused(
    variables: dict[str, str], without: tuple[str, ...], cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, variables, *without)
    with pytest.raises(UserError, match=cure):
        check_slurm()


@pytest.mark.parametrize(("layout", "fits"), [("1", True), ("1(x2)", False), ("2", False), ("2,1", False)])
def test_other_tasks_than_the_trainer_expects_are_refused(
    layout: str, fits: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, STEP | {"SLURM_STEP_TASKS_PER_NODE": layout})
    trainer = quiet_trainer(tmp_path, plugins=[SLURMEnvironment(auto_requeue=False)])
    if fits:
        check_processes(trainer)
    else:
        with pytest.raises(UserError, match=r"give both to --ntasks-per-node and --nodes"):
            check_processes(trainer)


def test_processes_of_torchrun_do_not_train_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    check_processes(quiet_trainer(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"torchrun started 2 processes, but trainer\.devices=1 .* expect 1: give both"
    ):
        check_processes(quiet_trainer(tmp_path))


def test_a_rank_without_a_place_does_not_train_in_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as LOCAL_RANK=1 of an earlier job sets it
    with pytest.raises(UserError, match="rank 1 of 1 ranks: start all of them by torchrun or srun"):
        check_processes(quiet_trainer(tmp_path))


def test_thousands_of_processes_are_not_started(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.devices is 9999, but this machine has \d+ processor cores"):
        check_processes(quiet_trainer(tmp_path, devices=9999))


def test_nodes_that_nothing_starts_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, num_nodes=2)
    with pytest.raises(UserError, match="put srun or torchrun"):
        check_processes(trainer)
    monkeypatch.setenv("NODE_RANK", "0")
    check_processes(trainer)
