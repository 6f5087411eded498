"""The health conditions of a run, each a pure function of the measurements of the last steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from textwrap import fill
from typing import Any

# thresholds by rule of thumb; `beta-dpo report` uses the same
BOUND_SHARE = 0.1  # share of the kept pairs whose β met a bound
FAR_FROM_BETA0 = 3.0  # factor between β and β0, in either direction
FAR_SHARE = 0.05  # share of the steps whose β may exceed that factor
SMALL_SAMPLE = 0.3  # effective sample size as a share of the batch; 0.87 for normal gaps
SATURATED = 0.98  # accuracy of pairs not yet trained on

Window = Mapping[str, Sequence[float]]  # a measurement's values at the last steps, oldest first


def beta_at_bounds(clamped: Sequence[float], most: float = BOUND_SHARE) -> bool:
    """Return whether β met a bound for more than the share `most` of the kept pairs."""
    return fmean(clamped) > most


def beta_far(beta: Sequence[float], base: Sequence[float], factor: float = FAR_FROM_BETA0) -> bool:
    """Return whether β was above `factor` times β0 or below β0/`factor` in more than `FAR_SHARE` of the steps."""
    return fmean(not base / factor <= b <= base * factor for b, base in zip(beta, base, strict=True)) > FAR_SHARE


def sample_size_collapsed(effective: Sequence[float], pairs: Sequence[float], least: float = SMALL_SAMPLE) -> bool:
    """Return whether the effective sample size of the filter is below the share `least` of the pairs.

    For normal gaps the share is √3/2 = 0.87: E[w]²/E[w²] for w = exp(−z²/2).
    """
    return sum(effective) < least * sum(pairs)


def chosen_falls_with_rejected(chosen: Sequence[float], rejected: Sequence[float]) -> bool:
    """Return whether both mean log-ratios are negative and the chosen one fell by more than the margin grew.

    In symbols: c < 0, r < 0 and −c > c − r, for rewards at β0, which cancels. c must lie two standard errors
    below 0, because every step has other pairs.
    """
    c, r = fmean(chosen), fmean(rejected)
    error = stdev(chosen) / math.sqrt(len(chosen)) if len(chosen) > 1 else math.inf
    return c < -2 * error and r < 0 and -c > c - r


def accuracy_saturated(accuracy: Sequence[float], most: float = SATURATED) -> bool:
    """Return whether nearly every training pair is ranked correctly before the policy's step on it."""
    return fmean(accuracy) > most


def nonfinite_pairs(total: Sequence[float]) -> bool:
    """Return whether the running `total` of pairs without a finite gap has grown."""
    return total[-1] > total[0]


def throughput_lost(tokens_per_second: Sequence[float], best: float, share: float = 0.5) -> bool:
    """Return whether the median is below a `share` of the `best` median so far."""
    return median(tokens_per_second) < share * best


@dataclass(frozen=True)
class Condition:
    """A health problem: what it needs, the test for it, what it means, and advice.

    The monitor, the report's findings and docs/monitoring.md (by docs/build.py) take their words from it.
    """

    name: str  # in the log and, with hyphens, as the heading in docs/monitoring.md
    needs: Sequence[str]  # if a run lacks one of these measurements, the condition is not tested
    holds: Callable[..., bool]  # takes the values of `needs`, in that order
    means: str  # a paragraph of the page
    advice: str  # a clause in small letters; after one on β comes that of the run's schedule
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
        beta_at_bounds,
        "β met its `floor` or `ceiling` for more than a tenth of the kept pairs. Then β no longer follows the"
        " data: it is its bound. β0·(1 + α·(mean gap − M0)) is negative as soon as the batch falls 1/α below "
        "M0: 1.7 nats for α = 0.6. Gaps grow through training, so the risk does too "
        "([choosing.md](choosing.md) has a figure).",
        "the gaps are wide for this schedule",
    ),
    Condition(
        "β far from β0",
        ("beta/used", "beta/base"),
        beta_far,
        "β lay beyond three times β0, or below a third of it, in more than a twentieth of the last steps. "
        "`beta/clamped` may be 0: a schedule has no ceiling by default. A batch of few pairs moves β more "
        "than a large one: α goes with the square root of the number of kept pairs.",
        "β0 was chosen for another strength of the constraint than the one that is trained",
        whole_window=False,
    ),
    Condition(
        "effective sample size collapsed",
        ("filter/effective_sample_size", "pairs"),
        sample_size_collapsed,
        "The Gaussian weights are worth less than 0.3 of the batch; normally distributed gaps give 0.87. "
        "Either a few pairs lie near M0 and the rest far away, or M0 and σ lag gaps that move fast (their "
        "memory is about ten steps).",
        "outliers stretch the gaps: look at the pairs with the most extreme ones (beta-dpo audit, or "
        "TensorBoard's text tab); if there are none, lower the learning rate",
    ),
    Condition(
        "chosen falls with rejected",
        # the last is logged only with a reference, without which the reward is no log-ratio
        ("train/reward_chosen", "train/reward_rejected", "train/reference_accuracy"),
        lambda chosen, rejected, _: chosen_falls_with_rejected(chosen, rejected),
        "The chosen responses have become less likely than under the reference, the rejected ones too, and "
        "the chosen fell by more than the margin between them grew. To a degree this is what DPO does; "
        "[choosing.md](choosing.md#why-does-the-chosen-reward-fall) explains it. Looked for only where there "
        "is a reference.",
        "only the difference is trained, so both may sink and probability leaks elsewhere: look at sampled "
        "answers, then lower the learning rate, raise model.beta0, or set model.sft_weight: 1",
    ),
    Condition(
        "accuracy saturated",
        ("train/reward_accuracy",),
        accuracy_saturated,
        "More than 98 % of the training pairs are ranked right before the policy is trained on them. What "
        "further steps change is mostly the size of the margin.",
        "little is left to learn from these pairs: compare with val/reward_accuracy; stop, or find harder pairs",
    ),
    Condition(
        "pairs without a finite gap",
        ("train/nonfinite_pairs",),
        nonfinite_pairs,
        "At least one pair of the last steps had a log-probability of NaN or infinity. It was left out and "
        "named in the log; more than `model.max_nonfinite_share` of a batch stop the run.",
        "lower the learning rate, use trainer.precision 32-true, or look at the pairs that the log names",
        whole_window=False,
    ),
    Condition(
        "throughput lost",
        ("tokens_per_second", "best_tokens_per_second"),
        lambda seen, best: throughput_lost(seen, best[-1]),
        "The median of tokens per second, over everything between the ends of two steps, is below half of the"
        " best median since the process started.",
        "look for other programs on the machine, heat, a slow disk, or checkpoints that are written too often",
    ),
)
BY_NAME = {condition.name: condition for condition in CONDITIONS}


def markdown_sections() -> str:
    """Return the section of every condition for docs/monitoring.md."""
    calmer = (
        "lower α or ε of the schedule, or measure gaps in standard deviations (`schedule.z_normalised: true`); the "
        "log line and the report say which of these holds for the schedule of the run"
    )
    sections = []
    for one in CONDITIONS:
        text = (one.means, f"*Advice:* {one.advice_with(calmer)}.")
        whole = [fill(part, 120, break_long_words=False, break_on_hyphens=False) for part in text]
        sections.append("\n\n".join([f"#### {one.name}", *whole]) + "\n")
    return "\n".join(sections)


def conditions_that_hold(window: Window, length: int) -> set[str]:
    """Return the names of the conditions that hold on the last `length` steps, or on fewer if one allows that."""
    found = set()
    for condition in CONDITIONS:
        values: list[Any] = [window[name] for name in condition.needs if name in window]
        steps = min((len(column) for column in values), default=0)
        enough = steps >= length or (steps > 1 and not condition.whole_window)
        if len(values) == len(condition.needs) and enough and condition.holds(*values):
            found.add(condition.name)
    return found
