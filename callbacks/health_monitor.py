"""The monitor that logs when a health condition starts and ends, and can stop the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from app.core.errors import StepRefused, UserError
from app.method.batch import OptimizerBatch
from app.method.ranges import AtLeastTwo, checked
from callbacks.bounded_beta import BoundedBeta
from callbacks.health import BY_NAME, CONDITIONS, conditions_that_hold

log = logging.getLogger(__name__)

LOGGED = {name for condition in CONDITIONS for name in condition.needs if "/" in name}


@checked
class HealthMonitor(Callback):
    """A callback that tests the last steps for the conditions of `callbacks.health`; it only reads logged values.

    A condition starts when it holds on the last `window` steps (for some conditions, from the second step on) and
    ends when it has not held for `window` steps. A condition whose values are not logged is not tested (an SFT run
    has no β). The order among the callbacks does not matter.

    Args:
        window: number of steps that a condition is tested on.
        stop_on: names of conditions that stop the run, with a checkpoint of the last step if `checkpoint` is on;
            the run ends with exit status 2 and an error that names the condition.
    """

    def __init__(self, window: AtLeastTwo = 20, stop_on: Sequence[str] = ()):
        if unknown := sorted(set(stop_on) - set(BY_NAME)):
            raise UserError(f"HealthMonitor: stop_on {unknown[0]!r} is none of {', '.join(map(repr, BY_NAME))}.")
        self.window = window
        self.stop_on = tuple(stop_on)
        self._values: dict[str, list[float]] = {}
        self._since: dict[str, int] = {}  # the step at which each current condition started
        self._last_held: dict[str, int] = {}
        self._last_end: float | None = None  # when the last step ended, on this process's clock
        self._calmer = ""  # the schedule's advice for the conditions on β

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedules = [one for one in trainer.callbacks if isinstance(one, BoundedBeta)]  # type: ignore[attr-defined]
        self._calmer = schedules[0].calmer if schedules else ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: OptimizerBatch, batch_idx: int
    ) -> None:
        logged = trainer.callback_metrics
        self.observe(
            trainer.global_step,
            {name: float(logged[name]) for name in LOGGED & logged.keys()}
            | {"pairs": float(len(batch.pair_ids))}
            | self.speed(batch.tokens),
            tell=trainer.is_global_zero,
        )

    def speed(self, tokens: int) -> dict[str, float]:
        """Return tokens per second of wall time since the last step ended, with loading, validation and saving."""
        before, self._last_end = self._last_end, time.perf_counter()
        return {} if before is None else {"tokens_per_second": tokens / (self._last_end - before)}

    def observe(self, step: int, measured: dict[str, float], tell: bool = True) -> None:
        """Add the measurements of step `step`; log the conditions that start or end if `tell`."""
        for name, value in measured.items():
            self._append(name, value)
        speed = self._values.get("tokens_per_second", [])
        if len(speed) == self.window:
            best = self._values.get("best_tokens_per_second", [0.0])[-1]
            self._append("best_tokens_per_second", max(best, median(speed)))
        for name in sorted(conditions_that_hold(self._values, self.window)):
            self._last_held[name] = step
            if name not in self._since:
                self._since[name] = step
                if tell:
                    advice = BY_NAME[name].advice_with(self._calmer)
                    log.warning("step %d: %s: %s (%s)", step, name, advice, BY_NAME[name].link)
        for name in [name for name in self._since if step - self._last_held[name] >= self.window]:
            if tell:
                log.info("step %d: no longer: %s (since step %d)", step, name, self._since[name])
            del self._since[name]

    def _append(self, name: str, value: float) -> None:
        self._values[name] = [*self._values.get(name, []), value][-self.window :]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if not self.stop_on:
            return
        held = [name for name in self.stop_on if name in self._since]
        # each rank measures its own speed, but all must stop together
        name = trainer.strategy.broadcast(held[0] if held else None)
        if name is not None:
            raise StepRefused(
                f"HealthMonitor stopped the run after step {trainer.global_step}: {name} ({BY_NAME[name].link}); "
                "mend it or take it out of stop_on, and resume with --ckpt_path last."
            )

    def state_dict(self) -> dict[str, Any]:
        # without the speed, which belongs to this machine
        values = {name: list(column) for name, column in self._values.items() if name in {*LOGGED, "pairs"}}
        return {"values": values, "since": dict(self._since), "last_held": dict(self._last_held)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._values = {name: list(column) for name, column in state_dict["values"].items()}
        self._since, self._last_held = dict(state_dict["since"]), dict(state_dict["last_held"])
