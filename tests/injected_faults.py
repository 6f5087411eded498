"""Faults that the environment variable FAULT orders, within the process that is to suffer them."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from app.method.step import StepDecision


class InjectedFault(Callback):
    """FAULT is `kind@step`. Kinds: `slow SECONDS`, this step and all later ones take so much longer; `nonfinite`,
    no pair of the step has finite log-probabilities; `raise` and `signal NAME` midway in the step; `kill STEPS`,
    by SIGKILL so many steps' time after this step, or the first one after a resume beyond it, began; `validation
    NAME` midway in the validation after so many steps; `write BYTES`, death when so much of the checkpoint then due
    is written; `full BYTES`, files can grow no larger from that checkpoint on."""

    def __init__(self) -> None:
        self.kind, _, when = os.environ.get("FAULT", "").partition("@")
        self.when = int(when or -1)
        self.began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.kind.startswith("slow") and trainer.global_step >= self.when:
            time.sleep(float(self.kind.split()[1]))
        if self.kind == "nonfinite" and trainer.global_step == self.when:
            policy = pl_module.get_submodule("policy")
            policy.register_forward_hook(lambda scorer, rows, logps: logps * float("nan"))
        before, self.began = self.began, time.monotonic()
        if self.kind.startswith("kill") and trainer.global_step >= self.when:
            # in time that this machine needed for the last step, checkpoint and validation included
            delay = float(self.kind.split()[1]) * (self.began - before if before else 0.05)
            self.kind = "spent"
            threading.Thread(target=self._kill, args=(delay,), daemon=True).start()

    def _kill(self, delay: float) -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        if trainer.global_step == self.when:
            self._send("signal")
            if self.kind == "raise":
                raise RuntimeError("an injected failure")

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.when and not trainer.sanity_checking:
            self._send("validation")

    def _send(self, kind: str) -> None:
        if self.kind.startswith(kind):
            os.kill(os.getpid(), signal.Signals[self.kind.split()[1]])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        if self.kind.startswith("full") and trainer.global_step == self.when:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.kind.split()[1]),) * 2)
        if self.kind.startswith("write") and trainer.global_step == self.when:
            # the kernel ends the process in the write that would pass the limit: half a file stays behind
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            size = int(self.kind.split()[1])
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
