"""The report's checks of the policy and its training: each is a pure function from a `Run` to a finding or None."""

from __future__ import annotations

import numpy as np

from app.core.intervals import bootstrap_mean
from app.report.finding import Finding, Level, sentence
from app.report.run import Run
from callbacks.health import BY_NAME, SATURATED

OVERFITTED = 0.1  # training accuracy minus held-out accuracy that gives a finding
SLOWER = 0.75  # late throughput as a share of early throughput, below which there is a finding


def chosen_probability_falls(run: Run) -> Finding | None:
    """Return a finding if the chosen log-ratio rises, or if it falls together with the rejected one (displacement).

    The fall is serious when the chosen response loses more than the margin gains.
    """
    chosen, rejected = run.curve("train/log_ratio_chosen"), run.curve("train/log_ratio_rejected")
    if chosen is None or rejected is None or len(chosen.part(0.75, 1)) < 2:
        return None
    up, down = bootstrap_mean(chosen.part(0.75, 1)), float(rejected.part(0.75, 1).mean())
    evidence = f"last quarter, log π − log π_ref in nats: chosen {up}, rejected {down:.3f}"
    if up.low > 0:
        return Finding(
            run.name,
            "good",
            f"Chosen responses gained {up.mean:.2f} nats of log-probability.",
            evidence,
            "",
            "drift",
        )
    if up.high >= 0 or down >= 0:
        return None
    serious = -up.mean > up.mean - down
    return Finding(
        run.name,
        "act" if serious else "watch",
        f"Chosen responses lost {-up.mean:.2f} nats of log-probability"
        + (", more than the margin gained." if serious else ", rejected ones more."),
        evidence,
        sentence(BY_NAME["chosen falls with rejected"].advice),
        "drift",
    )


def accuracy_is_saturated(run: Run) -> Finding | None:
    """Return a finding if nearly all training pairs are ranked correctly before the step that trains on them."""
    accuracy = run.curve("train/reward_accuracy")
    if accuracy is None or not len(accuracy.part(0.75, 1)):
        return None
    late = float(accuracy.part(0.75, 1).mean())
    if late < SATURATED:
        return None
    return Finding(
        run.name,
        "watch",
        f"{late:.1%} of training pairs are ranked right before they are trained on.",
        f"mean over the last quarter; saturated from {SATURATED:.0%}",
        sentence(BY_NAME["accuracy saturated"].advice),
        "accuracy",
    )


def overfitting(run: Run) -> Finding | None:
    """Return a finding if training accuracy is above held-out accuracy by at least OVERFITTED."""
    training, held_out = run.curve("train/reward_accuracy"), run.last("val/reward_accuracy")
    if training is None or held_out is None or not len(training.part(0.75, 1)):
        return None
    late = float(training.part(0.75, 1).mean())
    if late - held_out < OVERFITTED:
        return None
    return Finding(
        run.name,
        "act",
        f"Training pairs are ranked right {late - held_out:.0%} more often than held-out ones.",
        f"last quarter {late:.3f}, held-out {held_out:.3f}",
        "The run memorises: fewer epochs, a lower learning rate, or a higher model.beta0.",
        "accuracy",
    )


def against_the_baseline(run: Run) -> Finding | None:
    """Return a finding on the win rate over the SFT model's samples, if there is one."""
    rate = run.samples.get("win rate")
    if rate is None:
        return None
    level: Level = "good" if rate.low > 0.5 else "act" if rate.high < 0.5 else "watch"
    told, advice = {
        "good": (f"Its answers beat the SFT model's in {rate.mean:.0%} of prompts.", ""),
        "act": (
            f"Its answers lose to the SFT model's: win rate {rate.mean:.0%}.",
            "Look at the samples; a higher model.beta0 or a lower learning rate stays closer to the SFT model.",
        ),
        "watch": (
            f"Its answers cannot be told from the SFT model's: win rate {rate.mean:.0%}.",
            "The interval holds 50 %: sample more prompts (generate --count), or train longer.",
        ),
    }[level]
    return Finding(run.name, level, told, f"win rate {rate} [95 % interval], ties half", advice, "quality")


def against_other_runs(run: Run) -> Finding | None:
    """Return a finding on the win rates over the other runs' samples, compared per prompt, if there are any."""
    if not run.rivals:
        return None
    told = {
        name: "beat" if rate.low > 0.5 else "lose to" if rate.high < 0.5 else "cannot be told from"
        for name, rate in run.rivals.items()
    }
    return Finding(
        run.name,
        "good" if set(told.values()) == {"beat"} else "watch",
        f"Its answers {', '.join(f'{verb} those of {name}' for name, verb in told.items())}.",
        "win rate [95 % interval]: " + ", ".join(f"{name} {rate}" for name, rate in run.rivals.items()),
        "The intervals are over prompts: repeat with other seeds before preferring an arm.",
        "quality",
    )


def more_malformed_answers(run: Run) -> Finding | None:
    """Return a finding if the policy's samples are malformed more often than the SFT model's."""
    ours, theirs = run.samples.get("malformed share"), run.baseline.get("malformed share")
    if ours is None or theirs is None or ours.low <= theirs.high:
        return None
    return Finding(
        run.name,
        "watch",
        f"{ours.mean:.1%} of its answers are malformed, {theirs.mean:.1%} of the SFT model's.",
        f"{ours} against {theirs}",
        "Probability has leaked to broken answers: a higher model.beta0, or model.sft_weight.",
        "quality",
    )


def slower_at_the_end(run: Run) -> Finding | None:
    """Return a finding if the last quarter is slower than the early quarter that follows 5 % of warm-up."""
    speed = run.curve("train/tokens_per_second")
    if speed is None or len(speed.values) < 20:
        return None
    first, last = float(np.median(speed.part(0.05, 0.3))), float(np.median(speed.part(0.75, 1)))
    if last >= SLOWER * first:
        return None
    return Finding(
        run.name,
        "watch",
        f"The run ended at {last / first:.0%} of the speed at which it began.",
        f"median {first:,.0f} tokens per second early, {last:,.0f} late",
        sentence(BY_NAME["throughput lost"].advice),
        "speed",
    )


def pairs_without_a_gap(run: Run) -> Finding | None:
    """Return a finding if pairs were left out because their gap was not finite."""
    count = run.last("train/nonfinite_pairs")
    if not count:
        return None
    return Finding(
        run.name,
        "act",
        f"{count:.0f} times a pair had no finite gap and was left out.",
        "counted over the whole run; the log names the pairs",
        sentence(BY_NAME["pairs without a finite gap"].advice),
        "accuracy",
    )
