"""The table of health conditions, rules of thumb, of the monitor, the report's findings and docs/monitoring.md."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from app.core.errors import StepRefused, UserError
from app.method.batch import OptimizerBatch
from app.method.ranges import AtLeastTwo, checked
from callbacks.dynamic_beta import BoundedBeta

log = logging.getLogger(__name__)

SPEED, BEST_SPEED = "train/tokens_per_second", "best tokens per second"
TOTAL = "train/nonfinite_pairs"  # since the start of the run


def chosen_falls(chosen: Sequence[float], rejected: Sequence[float]) -> bool:
    c, r = fmean(chosen), fmean(rejected)
    error = stdev(chosen) / math.sqrt(len(chosen)) if len(chosen) > 1 else math.inf
    return c < -2 * error and r < 0 and -c > c - r


@dataclass(frozen=True)
class Condition:
    """A health problem: what it needs, the test for it, and advice."""

    name: str  # in the log, in the report and, with hyphens, as the heading in docs/monitoring.md
    needs: Sequence[str]  # if a run lacks one of these measurements, the condition is not tested
    holds: Callable[..., bool]  # takes the values of `needs` at the last steps, oldest first, in that order
    meaning: str  # continues "It holds if" in docs/monitoring.md
    advice: str  # a clause in small letters; after one on β comes that of the run's schedule
    chart: str  # of the report, which shows it
    whole_window: bool = True  # if false, it is tested from the second step on

    @property
    def link(self) -> str:
        return f"docs/monitoring.md#{self.name.replace(' ', '-')}"

    def advice_with(self, calmer: str) -> str:
        """Return the advice for a run whose schedule varies β less if one does what the clause `calmer` says."""
        return f"{self.advice}: {calmer}" if calmer and self.name.startswith("β") else self.advice


CONDITIONS = (
    Condition(
        "β at its bounds",
        ("beta/clamped",),
        lambda clamped: fmean(clamped) > 0.1,
        "β met its `floor` or `ceiling` for more than a tenth of the kept pairs. Such a β no longer follows the "
        "data. β0·(1 + α·(mean gap − M0)) is negative for a batch 1/α below M0: 1.7 nats for α = 0.6. Gaps grow "
        "through training, and the risk with them ([figure](choosing.md#what-follows-from-the-formulas)).",
        "the gaps are wide for this schedule",
        "beta",
    ),
    Condition(
        "β far from β0",
        ("beta/used", "beta/base"),
        lambda beta, base: fmean(not b0 / 3 <= b <= b0 * 3 for b, b0 in zip(beta, base, strict=True)) > 0.05,
        "β lay beyond three times β0, or below a third of it, in more than a twentieth of the steps. "
        "`beta/clamped` may be 0, because a schedule has no ceiling by default. The β of few pairs varies more: "
        "lower α in proportion to the square root of the number of kept pairs.",
        "such a β holds the policy to the reference far more or far less than the β0 that was chosen",
        "beta",
        whole_window=False,
    ),
    Condition(
        "effective sample size collapsed",
        ("filter/effective_sample_size", "pairs"),
        lambda effective, pairs: sum(effective) < 0.3 * sum(pairs),
        "the effective sample size of the Gaussian weights is below 0.3 of the batch. Normal gaps give √3/2 = "
        "0.87: E[w]²/E[w²] for w = exp(−z²/2). Either most pairs lie far from M0, or M0 and σ lag gaps that move "
        "fast (their memory is about ten steps).",
        "outliers stretch the gaps: look at the pairs with the most extreme ones (beta-dpo audit, or "
        "TensorBoard's text tab); if there are none, lower the learning rate",
        "filter",
    ),
    Condition(
        "chosen falls with rejected",
        ("train/reward_chosen", "train/reward_rejected", "train/reference_accuracy"),
        lambda chosen, rejected, _: chosen_falls(chosen, rejected),
        "both mean log-ratios are negative and the chosen one fell by more than the margin grew. In symbols: "
        "c < 0, r < 0 and −c > c − r; c must lie two standard errors below 0, because every step has other pairs. "
        "Without a reference the condition is not tested. DPO does this to a degree: "
        "[why](choosing.md#why-does-the-chosen-reward-fall).",
        "only the difference is trained, so both may sink and probability leaks elsewhere: look at sampled "
        "answers, then lower the learning rate, raise model.beta0, or set model.sft_weight: 1",
        "drift",
    ),
    Condition(
        "accuracy saturated",
        ("train/reward_accuracy",),
        lambda accuracy: fmean(accuracy) > 0.98,
        "more than 98 % of the training pairs are ranked right before the policy's step on them. Further steps "
        "change mostly the size of the margin.",
        "little is left to learn from these pairs: compare with val/reward_accuracy; stop, or find harder pairs",
        "accuracy",
    ),
    Condition(
        "pairs without a finite gap",
        (TOTAL,),
        lambda total: total[-1] > total[0],
        "at least one pair had a log-probability of NaN or infinity. The step leaves it out and the log names it. "
        "More than `model.max_nonfinite_share` of a batch stop the run.",
        "lower the learning rate, use trainer.precision 32-true, or look at the pairs that the log names",
        "accuracy",
        whole_window=False,
    ),
    Condition(
        "throughput lost",
        (SPEED, BEST_SPEED),
        lambda tokens_per_second, best: median(tokens_per_second) < best[-1] / 2,
        "the median of tokens per second is below half of the best median since the process started. The time of a "
        "step includes loading and saving, not validation.",
        "look for other programs on the machine, heat, a slow disk, or too frequent checkpoints",
        "speed",
    ),
)
BY_NAME = {condition.name: condition for condition in CONDITIONS}


class Window:
    """The measurements of the last `length` steps, in training or from the records of a run."""

    def __init__(self, length: int):
        self.length = length
        # the first value is the total before the first step, so that a pair lost there counts
        self.values: dict[str, list[float]] = {TOTAL: [0.0]}

    def add(self, measured: Mapping[str, float]) -> set[str]:
        """Add the measurements of a step; return the names of the conditions that hold on the last steps."""
        for name, value in measured.items():
            self._append(name, value)
        if len(speed := self.values.get(SPEED, [])) == self.length:
            self._append(BEST_SPEED, max(median(speed), *self.values.get(BEST_SPEED, [0.0])[-1:]))
        return {condition.name for condition in CONDITIONS if self._meets(condition)}

    def forget(self, condition: Condition) -> None:
        """Test `condition` on later steps alone; a total goes on from its last value."""
        for name in condition.needs:
            self.values[name] = self.values.get(name, [])[-1:] if name == TOTAL else []

    def _append(self, name: str, value: float) -> None:
        self.values[name] = [*self.values.get(name, []), value][-self.length :]

    def _meets(self, condition: Condition) -> bool:
        columns = [self.values.get(name, []) for name in condition.needs]
        steps = min(map(len, columns))
        return (steps >= self.length or (steps > 1 and not condition.whole_window)) and condition.holds(*columns)


LOGGED = {name for condition in CONDITIONS for name in condition.needs if "/" in name}


@checked
class HealthMonitor(Callback):
    """A callback that tests the last steps for the conditions; it only reads logged values.

    A condition starts when it holds on the last `window` steps (for some, from the second step on) and ends when it
    has not held for `window` steps. One whose values are not logged is not tested (an SFT run has no β).

    Args:
        window: number of steps that a condition is tested on.
        stop_on: names of conditions that stop the run with exit status 2 and, if `checkpoint` is on, a checkpoint
            of the last step. A resumed run tests them on its own steps alone.
    """

    def __init__(self, window: AtLeastTwo = 20, stop_on: Sequence[str] = ()):
        if unknown := sorted(set(stop_on) - set(BY_NAME)):
            raise UserError(f"HealthMonitor: stop_on {unknown[0]!r} is none of {', '.join(map(repr, BY_NAME))}.")
        self.window = Window(window)
        self.stop_on = tuple(stop_on)
        self._since: dict[str, int] = {}  # the step at which each current condition started
        self._last_held: dict[str, int] = {}
        self._calmer = ""  # the schedule's advice for the conditions on β

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedules = [one for one in trainer.callbacks if isinstance(one, BoundedBeta)]  # type: ignore[attr-defined]
        self._calmer = schedules[0].calmer if schedules else ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: OptimizerBatch, batch_idx: int
    ) -> None:
        logged = trainer.callback_metrics
        measured = {name: float(logged[name]) for name in LOGGED & logged.keys()}
        measured["pairs"] = float(len(batch.pair_ids))
        self.observe(trainer.global_step, measured, tell=trainer.is_global_zero)

    def observe(self, step: int, measured: dict[str, float], tell: bool = True) -> None:
        """Add the measurements of step `step`; log the conditions that start or end if `tell`."""
        for name in sorted(self.window.add(measured)):
            self._last_held[name] = step
            if name not in self._since:
                self._since[name] = step
                if tell:
                    advice = BY_NAME[name].advice_with(self._calmer)
                    log.warning("step %d: %s: %s (%s)", step, name, advice, BY_NAME[name].link)
        for name in [name for name in self._since if step - self._last_held[name] >= self.window.length]:
            if tell:
                log.info("step %d: no longer: %s (since step %d)", step, name, self._since[name])
            del self._since[name]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if not self.stop_on:
            return
        held = [name for name in self.stop_on if name in self._since]
        # each rank measures its own speed, but all must stop together
        name = trainer.strategy.broadcast(held[0] if held else None)
        if name is not None:
            resume = ", and resume with --ckpt_path last" if trainer.checkpoint_callbacks else ""
            cure = f"({BY_NAME[name].link}); correct the cause or take it out of stop_on{resume}"
            raise StepRefused(f"HealthMonitor stopped the run after step {trainer.global_step}: {name} {cure}.")

    def state_dict(self) -> dict[str, Any]:
        # without the speed, which belongs to this machine
        values = {name: column for name, column in self.window.values.items() if name not in (SPEED, BEST_SPEED)}
        return {"values": values, "since": dict(self._since), "last_held": dict(self._last_held)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.window.values |= state_dict["values"]
        self._since, self._last_held = dict(state_dict["since"]), dict(state_dict["last_held"])
        for name in self._since.keys() & set(self.stop_on):  # or the resumed run would stop before its first step
            del self._since[name]
            self.window.forget(BY_NAME[name])
