"""`train.sbatch` under a real Slurm: what is stopped, killed or lost goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, wait_until, why_not
from command_runs import ROOT, STEPS, assert_same_run, audit_of, write_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
SCRIPT = ROOT / "configs" / "slurm" / "train.sbatch"
PATIENCE = 120  # seconds, for what takes a few when the machine is idle
TIMEOUT = 20  # of a collective


PLACES = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
}


class Job:
    """A run of tiny steps on two nodes, submitted as a user would."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        model: str,
        *options: str,
        step_seconds: float = 0.5,
        words: tuple[str, ...] = (),
        **own: str,
    ) -> None:
        self.cluster, self.folder = cluster, folder
        write_config(folder, model)
        strategy = {"": "DDPStrategy", ".process_group_backend": "gloo", ".timeout": f"0:00:{TIMEOUT}"}
        words += tuple(word for name, value in strategy.items() for word in (f"--trainer.strategy{name}", value))
        layout = ("--nodes=2", "--ntasks-per-node=1", f"--chdir={folder}", f"--output={folder}/log")
        self.number = cluster.run(
            *("sbatch", "--parsable", *layout, *options, str(SCRIPT), "--config", "config.yaml", *words),
            environment=PLACES | {"FAULT": f"slow {step_seconds}@0", "SLURM_WAIT": "5"} | own,
        ).strip()
        self.run = folder / "runs" / "run" / own.get("FOLDER", f"job-{self.number}")

    @property
    def log(self) -> str:
        file = self.folder / "log"
        return file.read_text() if file.exists() else ""

    def reach(self, step: int) -> None:
        """Wait until a checkpoint of this step or a later one is there."""
        last = self.run / "checkpoints" / "last.ckpt"
        wait_until(
            lambda: last.exists() and int(last.resolve().stem.partition("=")[2]) >= step, PATIENCE, lambda: self.log
        )

    def wait_for(self, *states: str, seconds: float = PATIENCE) -> dict[str, str]:
        try:
            return self.cluster.wait_for(self.number, *states, seconds=seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log}") from error


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as started:
        yield started


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a job that nothing disturbed."""
    job = Job(cluster, tmp_path_factory.mktemp("whole"), tiny_llama, step_seconds=0)
    assert job.wait_for("COMPLETED")["Restarts"] == "0"
    table = audit_of(job.run)
    assert sorted(set(table["step"].to_pylist())) == list(range(1, STEPS + 1))
    assert len(set(table["beta"].to_pylist())) > STEPS // 2
    assert "train.sbatch: job" in job.log
    return job.run


def test_requeued_and_told_to_stop(cluster: Cluster, whole: Path, tiny_llama: str, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, tiny_llama)
    job.reach(4)
    cluster.run("scontrol", "requeue", job.number)
    job.reach(7)
    cluster.run("scancel", job.number)
    assert job.wait_for("CANCELLED")["Restarts"] == "1"
    job = Job(cluster, tmp_path, tiny_llama, FOLDER=job.run.name)
    job.reach(10)
    cluster.run("scancel", "--signal=USR1", job.number)
    assert job.wait_for("COMPLETED")["Restarts"] == "1"
    for name, stops in {"SIGTERM": 2, "SIGUSR1": 1}.items():
        assert job.log.count(f"beta-dpo: stopped by {name} after step") == 2 * stops  # by either rank
    assert_same_run(whole, job.run)


def test_the_time_limit_is_no_end(cluster: Cluster, whole: Path, tiny_llama: str, tmp_path: Path) -> None:
    # Slurm looks at its clock every half minute, and may send the signal up to a minute early
    job = Job(cluster, tmp_path, tiny_llama, "--time=2", "--signal=USR1@60", step_seconds=2.5)
    assert int(job.wait_for("COMPLETED", seconds=300)["Restarts"]) > 0
    assert "beta-dpo: stopped by SIGUSR1 after step" in job.log
    assert "train.sbatch: saved; the job is requeued" in job.log
    assert_same_run(whole, job.run)


def test_lost_ranks_and_nodes(cluster: Cluster, whole: Path, tiny_llama: str, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, tiny_llama)
    cure = f"`scontrol requeue {job.number}` resumes from the last checkpoint"

    job.reach(4)
    os.kill(cluster.rank("node2"), signal.SIGKILL)
    job.wait_for("FAILED", seconds=30)
    assert job.log.count(cure) == 1
    cluster.run("scontrol", "requeue", job.number)

    job.reach(8)
    os.kill(cluster.rank("node2"), signal.SIGSTOP)
    job.wait_for("FAILED", seconds=TIMEOUT + 40)
    assert job.log.count(cure) == 2
    cluster.run("scontrol", "requeue", job.number)

    job.reach(14)
    cluster.lose_node("node2")
    # Slurm requeues the job once it has given the node up, if srun has not noticed before and left
    left = job.wait_for("PENDING", "FAILED", seconds=90)["JobState"]
    cluster.start_node("node2")
    if left == "FAILED":
        assert job.log.count(cure) == 3
        cluster.run("scontrol", "requeue", job.number)
    assert job.wait_for("COMPLETED")["Restarts"] == "3"
    assert job.log.count("beta-dpo: another rank has ended, or does not answer") == 3
    assert "Traceback" not in job.log
    assert_same_run(whole, job.run)


def test_a_sweep_is_an_array(cluster: Cluster, tiny_llama: str, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    grid = {"ARMS": "beta_dpo", "SEEDS": "3", "ALPHAS": "0.3", "KEEPS": "0.5 1.0"}
    words = ("--model.reference", "cached")
    job = Job(cluster, tmp_path, tiny_llama, "--array=0-2", "--nodes=1", step_seconds=0, words=words, **grid)
    for task, state in enumerate(["COMPLETED", "COMPLETED", "FAILED"]):
        cluster.wait_for(f"{job.number}_{task}", state, seconds=PATIENCE)
    assert "train.sbatch: task 2, but the sweep has 2 points: --array=0-1." in job.log
    assert job.log.count("scoring the pairs under the reference, once for all runs from this model") == 1
    for keep in (0.5, 1.0):
        run = job.run.with_name(f"{job.run.name}_arm-beta_dpo_seed-3_alpha-0.3_keep-{keep}")
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["seed_everything"] == 3
        assert config["filter"]["init_args"]["keep_ratio"] == keep
        assert config["schedule"]["init_args"]["alpha"] == 0.3
        assert config["checkpoint"]["init_args"]["every_n_steps"] == 2  # as the configuration says
        table = audit_of(run).to_pandas()
        assert table.groupby("step")["kept"].mean()[1] == keep


def test_what_lightning_would_misread_is_refused(cluster: Cluster, tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    command = "beta-dpo fit --config config.yaml"
    cases = {
        ("--job-name=interactive", "--ntasks-per-node=1"): {
            f"srun {command}": "gives all 2 tasks of a job 'interactive' rank 0",
        },
        ("--ntasks=2",): {
            command: "The SLURM job has 2 tasks, but srun did not start this process: put srun before",
            f"srun {command}": "--ntasks=2 does not tell SLURM where the tasks run",
        },
    }
    for options, lines in cases.items():
        script = "#!/bin/bash\n" + "".join(f"{line}; echo status $?\n" for line in lines)
        (tmp_path / "script").write_text(script)
        place = ("--nodes=2", f"--chdir={tmp_path}", f"--output={tmp_path}/log")
        number = cluster.run("sbatch", "--parsable", *place, *options, f"{tmp_path}/script", environment=PLACES)
        cluster.wait_for(number.strip(), "COMPLETED", seconds=PATIENCE)
        log = (tmp_path / "log").read_text()
        assert log.count("status 2") == len(lines), log
        assert all(sentence in log for sentence in lines.values()), log
        assert "Traceback" not in log
    assert not (tmp_path / "runs").exists()
