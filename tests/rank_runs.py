"""A script started as several ranks on this machine, as a launcher would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

LIMIT_SECONDS = 900  # generous: only to end a deadlock


def run_ranks(script: Path, *arguments: str, logs: Path, ranks: int = 2) -> None:
    """Run `python SCRIPT ARGUMENTS` as `ranks` processes; fails with the end of their logs unless all end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(ranks):
        place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with open(logs / f"rank{rank}.log", "w") as log:
            command = [sys.executable, str(script), *arguments]
            started.append(subprocess.Popen(command, env=os.environ | place, stdout=log, stderr=log))
    try:
        codes = [rank.wait(LIMIT_SECONDS) for rank in started]
    finally:
        for rank in started:
            rank.kill()
    assert codes == [0] * ranks, "\n".join((logs / f"rank{r}.log").read_text()[-3000:] for r in range(ranks))
