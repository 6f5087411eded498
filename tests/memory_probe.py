"""A callback that measures what one step of a run takes in memory, for runs of the real command."""

from __future__ import annotations

import gc
import json
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def memory_status(field: str) -> int:
    """Of this process, in bytes: `VmRSS` now, `VmHWM` the most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class MemoryProbe(Callback):
    """Leaves the memory before the model is built and the peaks of start and step 2 in `memory-<rank>.json`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for library in ("peft", "bitsandbytes", "accelerate"):  # which adapters and a base in few bits import
            with suppress(ImportError):
                import_module(library)
        gc.collect()
        self.baseline = memory_status("VmRSS")
        forget_peak()

    def on_train_start(self, *_: Any) -> None:
        self.start = memory_status("VmHWM")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            forget_peak()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            seen = {"baseline": self.baseline, "start": self.start, "peak": memory_status("VmHWM")}
            Path(f"memory-{trainer.global_rank}.json").write_text(json.dumps(seen))
