"""One line in the log when a run falls ill, one when it is well again, and a stop where that is wanted."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from app.errors import StepRefused, UserError
from app.method.batch import OptimizerBatch
from app.method.ranges import AtLeastTwo, checked
from callbacks.bounded_beta import BoundedBeta
from callbacks.health import CONDITIONS, conditions_that_hold

log = logging.getLogger(__name__)

LOGGED = {name for condition in CONDITIONS for name in condition.needs if "/" in name}
BY_NAME = {condition.name: condition for condition in CONDITIONS}


@checked
class HealthMonitor(Callback):
    """Watches the last steps for the conditions of `callbacks.health`; reads what is logged and changes nothing.

    A condition starts when it holds on the last `window` steps, and ends when it has not held for as many. What a
    run does not log is not looked for (an SFT run has no β). Its place among the callbacks does not matter.

    Args:
        window: steps that a condition is judged on.
        stop_on: names of conditions that stop the run, with a checkpoint of the last step where `checkpoint` is
            on; the run ends with status 2 and says why.
    """

    def __init__(self, window: AtLeastTwo = 20, stop_on: Sequence[str] = ()):
        if unknown := sorted(set(stop_on) - set(BY_NAME)):
            raise UserError(f"HealthMonitor: stop_on {unknown[0]!r} is none of {', '.join(map(repr, BY_NAME))}.")
        self.window = window
        self.stop_on = tuple(stop_on)
        self._values: dict[str, list[float]] = {}
        self._since: dict[str, int] = {}  # the conditions that have started, and at which step
        self._last_held: dict[str, int] = {}
        self._last_end: float | None = None  # of a step, on this process's clock
        self._calmer = ""  # what this run's schedule advises against a wild β

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
        """Tokens per second of wall time since the last step ended: loading, validation and saving included."""
        before, self._last_end = self._last_end, time.perf_counter()
        return {} if before is None else {"tokens_per_second": tokens / (self._last_end - before)}

    def observe(self, step: int, measured: dict[str, float], tell: bool = True) -> None:
        """Take in what step number `step` measured; tell what has started and what has ended."""
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
                    advice = BY_NAME[name].advice
                    if name.startswith("β") and self._calmer:
                        advice += f": {self._calmer}"
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
        # ranks measure their own speed, and must stop together
        name = trainer.strategy.broadcast(held[0] if held else None)
        if name is not None:
            raise StepRefused(
                f"HealthMonitor stopped the run after step {trainer.global_step}: {name} ({BY_NAME[name].link}); "
                "mend it or take it out of stop_on, and go on with --ckpt_path last."
            )

    def state_dict(self) -> dict[str, Any]:
        # without the speed, which is this machine's
        values = {name: list(column) for name, column in self._values.items() if name in {*LOGGED, "pairs"}}
        return {"values": values, "since": dict(self._since), "last_held": dict(self._last_held)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._values = {name: list(column) for name, column in state_dict["values"].items()}
        self._since, self._last_held = dict(state_dict["since"]), dict(state_dict["last_held"])
