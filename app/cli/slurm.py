"""Checks of SLURM's and torchrun's variables, which refuse a job that Lightning would misread.

Two tasks that each assume rank 0, or a task that waits without end for another, cost hours on a cluster. The checks
find such cases before a process waits for another.
"""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer

from app.core.errors import UserError

IGNORED_NAMES = ("bash", "interactive")  # job names for which Lightning ignores SLURM's variables


def slurm_environment() -> SLURMEnvironment | None:
    """Return Lightning's SLURM environment without requeueing; None if Lightning does not read SLURM's variables.

    Lightning requeues inside a signal handler, while each rank may be at a different point of the step. Here
    `RunCheckpoint` saves and the batch script requeues. Raises UserError if Lightning would misread the variables.
    """
    if TorchElasticEnvironment.detect() or "SLURM_JOB_ID" not in os.environ:
        return None
    by_srun = "SLURM_STEP_ID" in os.environ
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS" if by_srun else "SLURM_NTASKS", "1"))
    name = os.environ.get("SLURM_JOB_NAME")
    if name in IGNORED_NAMES:
        if by_srun and tasks > 1:
            raise UserError(
                f"Lightning takes each of the {tasks} tasks of a SLURM job of the name {name!r} for rank 0: choose "
                "another --job-name."
            )
        return None
    if not by_srun and tasks > 1:
        raise UserError(
            f"The SLURM job has {tasks} tasks, but this process was not started by srun and would wait for the "
            "others for ever: put srun before the command."
        )
    if "SLURM_NTASKS" not in os.environ:
        return None
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"SLURM was asked for --ntasks={tasks}, which does not say where they run: use --ntasks-per-node."
        )
    return SLURMEnvironment(auto_requeue=False)


def check_processes(trainer: Trainer) -> None:
    """Raise UserError if the trainer expects other processes than were started."""
    devices, nodes = trainer.num_devices, trainer.num_nodes
    environment = trainer._accelerator_connector.cluster_environment
    if (
        isinstance(environment, LightningEnvironment)
        and nodes > 1
        and not {"NODE_RANK", "GROUP_RANK"} & set(os.environ)
    ):
        raise UserError(
            f"trainer.num_nodes is {nodes}, but nothing starts the processes on the other nodes: put srun or "
            "torchrun before the command."
        )
    started, wanted = os.environ.get("WORLD_SIZE", "1"), str(devices * nodes)
    if isinstance(environment, TorchElasticEnvironment) and started != wanted:  # each would train alone
        raise UserError(
            f"torchrun started {started} processes, but trainer.devices={devices} and trainer.num_nodes={nodes} "
            f"expect {wanted}: give both the values of --nproc-per-node and --nnodes."
        )
    if not isinstance(environment, SLURMEnvironment):
        return
    expected = f"{devices}(x{nodes})" if nodes > 1 else str(devices)
    started = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ["SLURM_NTASKS"])
    if started != expected:
        raise UserError(
            f"SLURM started {started} tasks per node, but trainer.devices={devices} and trainer.num_nodes={nodes} "
            f"expect {expected}: give both the values of --ntasks-per-node and --nodes."
        )
