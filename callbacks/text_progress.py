"""Progress for a log file: one plain line every n steps."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from app.core.intervals import digits
from app.method.ranges import PositiveInt, checked


@checked
class TextProgress(ProgressBar):
    """A progress bar as lines without control characters: step, metrics, steps per second, time left.

    Args:
        every_n_steps: steps between two lines; the last step always has a line. None prints every 10 steps, and
            on a terminal the command shows Lightning's `RichProgressBar` instead.
    """

    def __init__(self, every_n_steps: PositiveInt | None = None):
        super().__init__()
        self.every_n_steps = every_n_steps
        self._enabled = True
        self._began = (0.0, 0)  # when, and at which step

    def disable(self) -> None:
        """Switch the lines off; Lightning calls this on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = (time.perf_counter(), trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        step, last = trainer.global_step, total_steps(trainer)
        if self._enabled and (step % (self.every_n_steps or 10) == 0 or step == last):
            seconds, first = time.perf_counter() - self._began[0], self._began[1]
            shown = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
            print(progress_line(step, last, (step - first) / seconds, shown), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and not trainer.sanity_checking:
            shown = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
            print(f"validation after step {trainer.global_step}  {metrics_text(shown)}", flush=True)


def total_steps(trainer: Trainer) -> int | None:
    """Return the number of the last step; None if the run has no limit."""
    # not `estimated_stepping_batches`, which makes a resumed loader lose its position
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and trainer.num_training_batches != float("inf"):
        ends.append(int(trainer.num_training_batches) * trainer.max_epochs)
    return min(ends, default=None)


def progress_line(step: int, last: int | None, steps_per_second: float, metrics: dict[str, Any]) -> str:
    """Return a line such as `step 40/220  train/loss 0.653  beta/used 0.101  2.1 steps/s  1:26 left`."""
    parts = [f"step {step}" + (f"/{last}" if last is not None else ""), metrics_text(metrics)]
    parts.append(f"{steps_per_second:.3g} steps/s")
    if last is not None and steps_per_second > 0:
        minutes, seconds = divmod(round((last - step) / steps_per_second), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(part for part in parts if part)


def metrics_text(metrics: dict[str, Any]) -> str:
    return "  ".join(f"{name} {digits(float(value))}" for name, value in metrics.items())
