"""Handling of SIGTERM, SIGUSR1 and Ctrl-C: the run finishes and saves the current step, then ends."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The exception for a run that a signal ended after `step`, which is saved in `checkpoint`."""

    def __init__(self, number: int, step: int, checkpoint: str):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, saved in {checkpoint}")
        self.exit_status = 128 + number  # the status a shell reports for a process ended by a signal


class SignalWatch:
    """A signal handler that only stores the number of a signal in `received`; a second SIGINT interrupts at once.

    SLURM can send SIGUSR1 some time before a job's time limit (`--signal`). Lightning's handler for SIGTERM calls a
    collective inside the handler, while each rank may be at a different point of the step. This class leaves the
    agreement between ranks to its owner, at the end of the step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def start(self) -> None:
        if self._previous or threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread handle signals
        self.received = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)

    def stop(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        hint = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
        # not by print or logging, which may hold their locks when the signal arrives
        os.write(2, f"\n{signal.Signals(number).name}: the step is finished and saved first.{hint}\n".encode())
        self.received = number
