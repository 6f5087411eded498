"""Logging of the training stages without waiting for the device, and step times."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


class LoggedTraining(LightningModule):
    """A LightningModule that logs without waiting for its device and measures the time of a step."""

    _step_ended = 0.0  # from time.perf_counter, like `_validation_started`
    _validation_started = 0.0

    def log(self, name: str, value: Any, *args: Any, **settings: Any) -> None:
        """Log `value`, a number as a CPU tensor; Lightning would copy it to the device and wait for the copy."""
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        super().log(name, value, *args, **settings)

    def on_fit_start(self) -> None:
        """Number logged values by completed steps, as checkpoints do; Lightning's own number is one less."""
        connector, trainer = self.trainer._logger_connector, self.trainer
        write = connector.log_metrics

        def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
            if metrics and step is None and "step" not in metrics:
                metrics, step = {"epoch": trainer.current_epoch, **metrics}, trainer.global_step
            write(metrics, step)

        connector.log_metrics = log_metrics  # type: ignore[method-assign]

    def on_train_start(self) -> None:
        self._step_ended = time.perf_counter()

    def on_validation_start(self) -> None:
        self._validation_started = time.perf_counter()

    def on_validation_end(self) -> None:
        self._step_ended += time.perf_counter() - self._validation_started

    def step_seconds(self) -> float:
        """Return the seconds since the last step or the start, with loader and callbacks but without validation."""
        before, self._step_ended = self._step_ended, time.perf_counter()
        return self._step_ended - before


def warn_of_nonfinite(stage: str, figures: Mapping[str, Tensor]) -> None:
    """Warn if the `figures` of an evaluation leave out `nonfinite_pairs`."""
    left_out, counted = (int(figures.get(name, 0)) for name in ("nonfinite_pairs", "pairs"))
    if left_out:
        rest = f"the means are those of the other {counted}" if counted else "so there is no mean to report"
        rank_zero_warn(f"{stage}: {left_out} of {left_out + counted} pairs have no finite gap: {rest}.")
