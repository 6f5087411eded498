"""SIGTERM, SIGUSR1 and Ctrl-C: noted when they come, obeyed when the step under way is finished and saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal ended the run between two steps, and `checkpoint` holds all of it up to `step`."""

    def __init__(self, number: int, step: int, checkpoint: str):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, saved in {checkpoint}")
        self.exit_status = 128 + number  # as a shell reports a process that a signal ended


class SignalWatch:
    """While it is on, these signals only leave their number in `received`; a second SIGINT breaks off.

    SIGUSR1 is what SLURM sends, when asked to (`--signal`), some time before a job's time limit.
    Lightning's own handler for SIGTERM calls a collective from within the handler, at whatever point of a step
    each rank happens to be; this one leaves it to its owner to settle with the other ranks at the step's end.
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
        # not by print or logging: the signal may have come while they hold their locks
        os.write(2, f"\n{signal.Signals(number).name}: the step is finished and saved first.{hint}\n".encode())
        self.received = number
