"""A real Slurm of two nodes on this machine, with daemons of its own in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

NODES = {"node1": 17001, "node2": 17002}
PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "squeue", "srun", "sbatch", "scontrol", "scancel", "unshare")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
FirstJobId={first_job}
ReturnToService=2
SlurmdTimeout=12
KillWait=20
UnkillableStepTimeout=30
MessageTimeout=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What this machine lacks for a cluster; None when nothing."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"no Slurm here: {', '.join(missing)} missing (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "only root can start slurmd"


class Cluster:
    """Runs while its `with` block does; nothing of it is left afterwards.

    Each slurmd has a host name and a hosts file of its own, in a namespace: Lightning takes the name of the first
    node for the address where the ranks meet.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._namespaces: dict[str, str] = {}

    def __enter__(self) -> Cluster:
        host = socket.gethostname().partition(".")[0]
        nodes = [f"NodeName={n} NodeAddr=127.0.0.1 Port={p} CPUs=1 RealMemory=1000" for n, p in NODES.items()]
        # an id that comes round again would meet what the last cluster left of it
        first_job = random.SystemRandom().randint(1000, 9000)
        text = CONFIGURATION.format(folder=self.folder, host=host, first_job=first_job, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        names = [f"localhost {host}", *NODES]
        (self.folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in names))
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        self.folder.chmod(0o755)  # munged asks for a folder that everybody can enter
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        try:
            self.run("munged", *(f"--{name}={self.folder}/munge.{end}" for name, end in files.items()))
            self.run("slurmctld", "-c")
            for name in NODES:
                self.start_node(name)
            wait_until(lambda: self.run("sinfo", "-h", "-o", "%T:%D").strip() == "idle:2", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
            self.run("scancel", "--full", "--signal=KILL", "--user=root")
            wait_until(lambda: not self.run("squeue", "-h", "-t", "R,CG"), 40)
        for name in self._namespaces:
            self.lose_node(name)
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munge"):
            with contextlib.suppress(OSError, ValueError):  # no such file, none in it, or no such process
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)
        shutil.rmtree(self.folder)

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """What a command of Slurm prints. Raises subprocess.SubprocessError when it fails or hangs."""
        variables = {**self.environment, **(environment or {})}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    # --- jobs --------------------------------------------------------------------------------------------

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` tells of a job, by field."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_for(self, number: str, *states: str, seconds: float) -> dict[str, str]:
        """The job once it is in one of these states. Raises TimeoutError, also where it ended in another."""
        wait_until(lambda: self.job(number)["JobState"] in (*states, *ENDS), seconds, lambda: str(self.job(number)))
        job = self.job(number)
        if job["JobState"] not in states:
            raise TimeoutError(f"the job has ended otherwise: {job}")
        return job

    # --- nodes -------------------------------------------------------------------------------------------

    def start_node(self, name: str) -> None:
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        inside = f"mount --bind {self.folder}/hosts /etc/hosts && hostname {name} && exec slurmd -N {name}"
        self.run("unshare", "--uts", "--mount", "--propagation", "private", "bash", "-c", inside)
        file = self.folder / f"slurmd-{name}.pid"
        wait_until(lambda: file.exists() and file.read_text().strip(), 30)
        self._namespaces[name] = os.readlink(f"/proc/{int(file.read_text())}/ns/uts")

    def lose_node(self, name: str) -> None:
        """End at one stroke all that runs on a node, as a power failure does."""
        for process in self.processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        (self.folder / f"slurmd-{name}.pid").unlink(missing_ok=True)

    def processes(self, name: str) -> list[int]:
        """All that runs on a node."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns" / "uts") == self._namespaces[name]:
                    found.append(int(entry.name))
        return found

    def rank(self, name: str) -> int:
        """The training process on a node."""
        for process in self.processes(name):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
                if "python" in words[0] and Path(words[1]).name == "beta-dpo":
                    return process
        raise ProcessLookupError(f"nothing is being trained on {name}")


def wait_until(true: Callable[[], object], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    """Return once `true()` is. Raises TimeoutError, with `why()` for the reason."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s: {why()}")
        time.sleep(0.2)
