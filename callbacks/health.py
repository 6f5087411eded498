"""The health conditions of a run, each a pure function of the measurements of the last steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
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
    """A health problem: the measurements it needs, the test for it, and advice."""

    name: str  # in the log and, with hyphens, as the heading in docs/monitoring.md
    needs: Sequence[str]  # if a run lacks one of these measurements, the condition is not tested
    holds: Callable[..., bool]  # takes the values of `needs`, in that order
    advice: str
    whole_window: bool = True  # if false, it is tested from the second step on

    @property
    def link(self) -> str:
        return f"docs/monitoring.md#{self.name.replace(' ', '-')}"


CONDITIONS = (
    Condition(
        "β at its bounds",
        ("beta/clamped",),
        beta_at_bounds,
        "the gaps are wide for this schedule",
    ),
    Condition(
        "β far from β0",
        ("beta/used", "beta/base"),
        beta_far,
        "β lies beyond three times β0 or below a third of it, where β0 was not chosen for",
        whole_window=False,
    ),
    Condition(
        "effective sample size collapsed",
        ("filter/effective_sample_size", "pairs"),
        sample_size_collapsed,
        "a few pairs carry nearly all the filter's weight: look at the gaps for outliers (beta-dpo audit)",
    ),
    Condition(
        "chosen falls with rejected",
        # the last is logged only with a reference, without which the reward is no log-ratio
        ("train/reward_chosen", "train/reward_rejected", "train/reference_accuracy"),
        lambda chosen, rejected, _: chosen_falls_with_rejected(chosen, rejected),
        "the chosen responses lose more likelihood than the margin gains: lower the learning rate, raise β0, "
        "or set model.sft_weight: 1",
    ),
    Condition(
        "accuracy saturated",
        ("train/reward_accuracy",),
        accuracy_saturated,
        "there is little left to learn from these pairs: stop, or compare with val/reward_accuracy before going on",
    ),
    Condition(
        "pairs without a finite gap",
        ("train/nonfinite_pairs",),
        nonfinite_pairs,
        "they are left out: lower the learning rate, use trainer.precision 32-true, or look at those named above",
        whole_window=False,
    ),
    Condition(
        "throughput lost",
        ("tokens_per_second", "best_tokens_per_second"),
        lambda seen, best: throughput_lost(seen, best[-1]),
        "steps take more than twice as long as they did: look for other programs on the machine, or a slow disk",
    ),
)


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
