"""Checks of SLURM's and torchrun's variables, before a process trains alone or waits for another without end."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from app.core.errors import UserError

IGNORED_NAMES = ("bash", "interactive")  # job names for which Lightning ignores SLURM's variables
NODE_RANKS = {"NODE_RANK", "GROUP_RANK"}


def check_slurm() -> None:
    """Raise UserError if Lightning would misread SLURM's variables."""
    if TorchElasticEnvironment.detect() or "SLURM_JOB_ID" not in os.environ:
        return
    by_srun = "SLURM_STEP_ID" in os.environ
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS" if by_srun else "SLURM_NTASKS", "1"))
    name = os.environ.get("SLURM_JOB_NAME")
    if name in IGNORED_NAMES:
        if by_srun and tasks > 1:
            raise UserError(f"Lightning gives all {tasks} tasks of a job {name!r} rank 0: use another --job-name.")
        return
    if not by_srun and tasks > 1:
        cure = "put srun before the command, or this process waits for the others for ever"
        raise UserError(f"The SLURM job has {tasks} tasks, but srun did not start this process: {cure}.")
    if "SLURM_NTASKS" in os.environ and tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(f"--ntasks={tasks} does not tell SLURM where the tasks run: use --ntasks-per-node.")


def check_processes(trainer: Trainer) -> None:
    """Raise UserError if the trainer expects other processes than were started; they would wait, or train alone."""
    devices, nodes = trainer.num_devices, trainer.num_nodes
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    if rank >= trainer.world_size:  # it would train, say nothing and save nothing
        cure = "start all of them by torchrun or srun, or unset RANK, LOCAL_RANK and SLURM_PROCID"
        raise UserError(f"The environment makes this process rank {rank} of {trainer.world_size} ranks: {cure}.")
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, LightningEnvironment) and devices > 8 * (cores := os.cpu_count() or 1):
        raise UserError(f"trainer.devices is {devices}, but this machine has {cores} processor cores: lower it.")
    if isinstance(environment, LightningEnvironment) and nodes > 1 and not NODE_RANKS & set(os.environ):
        raise UserError(f"trainer.num_nodes={nodes}: put srun or torchrun before the command, which starts all.")
    if isinstance(environment, TorchElasticEnvironment):
        starter, cure = "torchrun", "--nproc-per-node and --nnodes"
        started, expected = f"{os.environ.get('WORLD_SIZE', '1')} processes", str(devices * nodes)
    elif isinstance(environment, SLURMEnvironment):
        starter, cure = "SLURM", "--ntasks-per-node and --nodes"
        started = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ["SLURM_NTASKS"]) + " tasks per node"
        expected = f"{devices}(x{nodes})" if nodes > 1 else str(devices)
    else:
        return
    if started.split()[0] != expected:
        ranks = f"trainer.devices={devices} and trainer.num_nodes={nodes}"
        raise UserError(f"{starter} started {started}, but {ranks} expect {expected}: give both to {cure}.")
