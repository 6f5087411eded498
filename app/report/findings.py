"""The findings of a report: sentences with evidence and advice, from health conditions and the whole run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import pandas as pd

from app.core.intervals import Estimate, bootstrap_mean, digits, share_over, span
from app.report.run import Run
from callbacks.dynamic_beta import BetaScheduler, EpsilonBeta
from callbacks.health import BEST_SPEED, BY_NAME, CONDITIONS, Window

Level = Literal["act", "watch", "good"]  # something to change, something to know, something that went well
# what answers do to those of another model, and advice on a win rate over the SFT model
WINS: dict[Level, tuple[str, str]] = {
    "good": ("beat", ""),
    "act": ("lose to", "Look at the samples; a higher model.beta0 or a lower rate stays closer to the SFT model."),
    "watch": ("cannot be told from", "The interval holds 50 %: sample more (generate --count), or train longer."),
}
OFTEN = 0.1  # share of the steps from which a condition asks for a change
WIDE_SWING = 0.5  # mean change of β from step to step, as a share of β0
OVERFITTED = 0.1  # training accuracy minus held-out accuracy that gives a finding


class Finding(NamedTuple):
    """One sentence about a run, with its evidence and advice."""

    level: Level
    sentence: str
    evidence: str
    chart: str  # anchor of the chart that shows it
    advice: str = ""
    run: str = ""


def findings(runs: Sequence[Run]) -> list[Finding]:
    """Return the findings of all runs, sorted by level and then by run."""
    checks = (samples, conditions, movement_of_beta, dropped_pairs, displacement, overfitting)
    found = [finding._replace(run=run.name) for run in runs for check in checks for finding in check(run)]
    return sorted(found, key=lambda finding: get_args(Level).index(finding.level))


def conditions(run: Run) -> Iterator[Finding]:
    """Yield a finding for every health condition that held at some step, as the monitor would have seen it."""
    size = (run.callback("HealthMonitor") or {}).get("window") or 20
    for condition in CONDITIONS:
        needs = [name for name in condition.needs if name != BEST_SPEED]
        if not set(needs) <= run.curves.keys():
            continue
        seen = pd.concat({name: run.curves[name] for name in needs}, axis=1, join="inner").dropna()
        window = Window(size)
        rows = zip(seen.index, seen.to_dict("records"), strict=True)
        held = [step for step, row in rows if condition.name in window.add(row)]
        if not held:
            continue
        often = len(held) >= OFTEN * len(seen) or held[-1] == seen.index[-1]
        values = (f"{name} {span(seen.loc[held, name])}" for name in needs)
        when = f"at step {held[0]}" if len(held) == 1 else f"at {len(held)} steps from {held[0]} to {held[-1]}"
        yield Finding(
            "act" if often else "watch",
            sentence(f"{condition.name} {when}"),
            f"{len(held)} of {len(seen)} steps, each with those before it; there {', '.join(values)}",
            condition.chart,
            sentence(condition.advice_with(calmer_beta(run))),
        )


def calmer_beta(run: Run) -> str:
    """Return the clause of this run's schedule that makes its β vary less."""
    if run.callback("EpsilonBeta") is not None:
        return EpsilonBeta.calmer
    return BetaScheduler(z_normalised=bool((run.callback("BetaScheduler") or {}).get("z_normalised"))).calmer


def movement_of_beta(run: Run) -> Iterator[Finding]:
    """Yield a finding on a dynamic β: it hardly moved, varied too much between steps, or followed the data."""
    if not {"beta/used", "beta/base", "beta/clamped"} <= run.curves.keys():  # only a schedule logs clamped β
        return
    beta, base, clamped = run.curves["beta/used"], run.curves["beta/base"].iloc[-1], run.curves["beta/clamped"]
    low, high = beta.quantile([0.05, 0.95])
    swing = float(beta.diff().abs().mean()) / base if len(beta) > 1 else 0.0
    evidence = (
        f"5 % to 95 % of steps: {digits(low)} to {digits(high)}; mean change from step to step {swing:.0%} of "
        f"β0 = {digits(base)}; at a bound in {(clamped > 0).mean():.1%} of steps"
    )
    if max(abs(high - base), abs(low - base)) < 0.02 * base:
        advice = "This run is plain DPO in all but name: raise the schedule's α or ε, or train until the gaps open."
        yield Finding("watch", f"β hardly left β0 = {digits(base)}.", evidence, "beta", advice)
    elif swing > WIDE_SWING:
        told = f"β jumped by {swing:.0%} of β0 from one step to the next."
        advice = sentence(f"{calmer_beta(run)}, or raise data.batch_size")
        yield Finding("act", told, evidence, "beta", f"Such a β follows the noise of the batch. {advice}")
    else:
        told = f"β followed the data, mostly between {digits(low)} and {digits(high)}."
        yield Finding("good", told, evidence, "beta")


def dropped_pairs(run: Run) -> Iterator[Finding]:
    """Yield a finding on whether the filter drops flipped pairs more often, if the data marks flipped pairs."""
    if run.audit is None or "flipped" not in run.audit or not run.filters:
        return
    known = run.audit[run.audit.flipped.notna()]
    wrong = known.flipped.astype(bool)
    if wrong.all() or not wrong.any():
        return
    flipped, clean = (share_over(rows.pair_id.to_numpy(), ~rows.kept) for rows in (known[wrong], known[~wrong]))
    evidence = f"dropped: flipped {flipped}, not flipped {clean} (share [95 % interval over pairs])"
    if flipped.low > clean.high:
        times = f"{flipped.mean / clean.mean:.1f} times as often as" if clean.mean else "and never"
        yield Finding("good", f"The filter dropped pairs marked as flipped {times} the others.", evidence, "filter")
    else:
        told = "The filter did not drop pairs marked as flipped more often than the others."
        advice = "It needs gaps that tell them apart: train longer, or lower ρ (filter.keep_ratio)."
        yield Finding("watch", told, evidence, "filter", advice)


def displacement(run: Run) -> Iterator[Finding]:
    """Yield a finding if the chosen log-ratio rises, or falls by less than the rejected one."""
    chosen, rejected = (run.part(f"train/log_ratio_{side}", 0.75, 1) for side in ("chosen", "rejected"))
    if len(chosen) < 2 or not len(rejected):
        return
    moved, other = bootstrap_mean(chosen), float(rejected.mean())
    evidence = f"last quarter, log π − log π_ref in nats: chosen {moved}, rejected {other:.3f}"
    if moved.low > 0:
        told = f"Chosen responses gained {moved.mean:.2f} nats of log-probability."
        yield Finding("good", told, evidence, "drift")
    elif moved.high < 0 and other <= 2 * moved.mean:
        told = f"Chosen responses lost {-moved.mean:.2f} nats of log-probability, rejected ones more."
        yield Finding("watch", told, evidence, "drift", sentence(BY_NAME["chosen falls with rejected"].advice))


def overfitting(run: Run) -> Iterator[Finding]:
    """Yield a finding if training accuracy is above held-out accuracy by at least OVERFITTED."""
    training, held_out = run.part("train/reward_accuracy", 0.75, 1), run.last("val/reward_accuracy")
    if held_out is not None and len(training) and (late := float(training.mean())) - held_out >= OVERFITTED:
        told = f"Training pairs are ranked right {late - held_out:.0%} more often than held-out ones."
        advice = "The run memorises: fewer epochs, a lower learning rate, or a higher model.beta0."
        yield Finding("act", told, f"last quarter {late:.3f}, held-out {held_out:.3f}", "accuracy", advice)


def samples(run: Run) -> Iterator[Finding]:
    """Yield findings on the sampled answers beside those of the SFT model and of the other runs."""
    if (rate := run.samples.get("win rate")) is not None:
        verb, advice = WINS[wins(rate)]
        told = f"Its answers {verb} the SFT model's: win rate {rate.mean:.0%}."
        yield Finding(wins(rate), told, f"win rate {rate} [95 % interval], ties half", "quality", advice)
    if run.rivals:
        levels = {name: wins(rate) for name, rate in run.rivals.items()}
        told = ", ".join(f"{WINS[level][0]} those of {name}" for name, level in levels.items())
        rates = ", ".join(f"{rate} against {name}" for name, rate in run.rivals.items())
        yield Finding(
            "good" if set(levels.values()) == {"good"} else "watch",
            f"Its answers {told}.",
            f"its win rate [95 % interval]: {rates}",
            "quality",
            "The intervals are over prompts: repeat with other seeds before preferring an arm.",
        )
    ours, theirs = run.samples.get("malformed share"), run.baseline.get("malformed share")
    if ours is not None and theirs is not None and ours.low > theirs.high:
        told = f"{ours.mean:.1%} of its answers are malformed, {theirs.mean:.1%} of the SFT model's."
        advice = "Probability has leaked to broken answers: a higher model.beta0, or model.sft_weight."
        yield Finding("watch", told, f"{ours} against {theirs}", "quality", advice)


def wins(rate: Estimate) -> Level:
    """Return whether a win rate is above one half ("good"), below it ("act"), or its interval holds it."""
    return "good" if rate.low > 0.5 else "act" if rate.high < 0.5 else "watch"


def sentence(clause: str) -> str:
    """Return a clause as a sentence; β stays small, because its capital letter looks like a B."""
    return f"{clause[0].upper() if clause[0].isascii() else clause[0]}{clause[1:]}."
