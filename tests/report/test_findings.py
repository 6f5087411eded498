"""Each finding where its number calls for it, and not where it does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from synthetic_runs import audit_of, run_with

from app.core.intervals import Estimate, share_over, wilson
from app.report.findings import findings
from callbacks import HealthMonitor
from callbacks.health import BY_NAME, SPEED

# for each condition: curves under which it holds at the end, and under which it does not
CASES: dict[str, tuple[dict[str, Sequence[float]], dict[str, Sequence[float]]]] = {
    "β at its bounds": ({"beta/clamped": [0.0] * 30 + [0.5] * 10}, {"beta/clamped": [0.0] * 39 + [1.0]}),
    "β far from β0": (
        {"beta/used": [0.1] * 35 + [0.5] * 5, "beta/base": [0.1] * 40},
        {"beta/used": [0.1] * 39 + [0.5], "beta/base": [0.1] * 40},
    ),
    "effective sample size collapsed": (
        {"filter/effective_sample_size": [15.0] * 10 + [3.2] * 30, "pairs": [16.0] * 40},
        {"filter/effective_sample_size": [13.0] * 40, "pairs": [16.0] * 40},
    ),
    "chosen falls with rejected": (
        {
            "train/reward_chosen": [-0.3, -0.29] * 20,
            "train/reward_rejected": [-0.4] * 40,
            "train/reference_accuracy": [0.5] * 40,
        },
        {"train/reward_chosen": [-0.3, -0.29] * 20, "train/reward_rejected": [-0.4] * 40},  # no reference
    ),
    "accuracy saturated": ({"train/reward_accuracy": [0.99] * 40}, {"train/reward_accuracy": [0.9] * 40}),
    "pairs without a finite gap": ({"train/nonfinite_pairs": [3.0]}, {"train/nonfinite_pairs": [0.0] * 40}),
    SPEED: ({SPEED: [100.0] * 25 + [40.0] * 25}, {SPEED: [100.0, 60.0] * 25}),
}


@pytest.mark.parametrize(("name", "ill", "well"), [(name, *case) for name, case in CASES.items()])
def test_the_report_says_what_the_monitor_says(
    name: str, ill: dict[str, Sequence[float]], well: dict[str, Sequence[float]]
) -> None:
    name = "throughput lost" if name == SPEED else name
    assert findings([run_with(**well)]) == []
    run, monitor, held = run_with(**ill), HealthMonitor(), []
    for step, row in enumerate(zip(*ill.values(), strict=True), 1):
        monitor.observe(step, dict(zip(ill, row, strict=True)))
        if monitor._last_held.get(name) == step:
            held.append(step)
    (found,) = findings([run])
    when = f"at step {held[0]}" if len(held) == 1 else f"at {len(held)} steps from {held[0]} to {held[-1]}"
    assert found.sentence == f"{name[0].upper() if name[0].isascii() else name[0]}{name[1:]} {when}."
    assert found.level == "act"
    assert found.chart == BY_NAME[name].chart
    assert BY_NAME[name].advice[1:] in found.advice


def test_evidence_advice_and_window_are_those_of_the_run() -> None:
    run = run_with(beta__used=[0.1] * 90 + [0.4] * 10, beta__base=[0.1] * 100, beta__floor=[0.001] * 100)
    entry = {"class_path": "callbacks.BetaScheduler", "init_args": {"z_normalised": True}}
    run.config = {
        "schedule": entry,
        "health": {"class_path": "callbacks.HealthMonitor", "init_args": {"window": 2}},
    }
    (found,) = findings([run])
    assert found.sentence == "β far from β0 at 10 steps from 91 to 100."
    assert found.evidence == "10 of 100 steps, each with those before it; there beta/used 0.4, beta/base 0.1"
    assert found.advice.endswith(": lower schedule.alpha.")
    run.config = {}
    assert "z_normalised" in findings([run])[0].advice
    # a condition that has passed, and was rare, asks for nothing
    passed = run_with(beta__clamped=[0.0] * 10 + [0.6] * 5 + [0.0] * 385)
    (found,) = findings([passed])
    assert (found.level, found.sentence) == ("watch", "β at its bounds at 12 steps from 20 to 31.")


@pytest.mark.parametrize(
    ("beta", "level", "word"),
    [
        ([0.1, 0.1005] * 20, "watch", "hardly left"),
        ([0.04, 0.2] * 20, "act", "jumped by 160%"),
        (list(np.linspace(0.08, 0.12, 40)), "good", "followed the data"),
    ],
)
def test_how_beta_moved(beta: list[float], level: str, word: str) -> None:
    run = run_with(beta__used=beta, beta__base=[0.1] * 40, beta__clamped=[0.0] * 39 + [0.5])
    (found,) = findings([run])
    assert (found.level, word in found.sentence) == (level, True)
    assert found.evidence.endswith("at a bound in 2.5% of steps")
    del run.curves["beta/clamped"]  # plain DPO: its β is not meant to move
    assert findings([run]) == []


def test_a_pair_seen_often_counts_once() -> None:
    once = share_over(np.arange(50), np.arange(50) < 10)
    assert share_over(np.tile(np.arange(50), 20), np.tile(np.arange(50) < 10, 20)) == once
    assert once == wilson(0.2, 50)


def test_who_is_dropped() -> None:
    audit = audit_of()
    run = run_with("run", audit, filter__kept_fraction=[0.8])
    (found,) = findings([run])
    assert found.level == "good"
    share = 1 - audit.kept[audit.flipped].mean()
    assert f"flipped {share:.3f}" in found.evidence
    assert "and never the others" in found.sentence  # of the synthetic run's clean pairs none is dropped
    run.audit = audit.assign(kept=np.arange(len(audit)) % 5 > 0)
    assert findings([run])[0].level == "watch"
    run.audit = audit.drop(columns="flipped")
    assert findings([run]) == []
    unfit = audit.assign(gap=np.where(audit.kept, audit.gap, np.nan))  # no filter left these out
    assert findings([run_with("run", unfit, filter__kept_fraction=[0.8])]) == []


@pytest.mark.parametrize(
    ("chosen", "rejected", "level"), [(-0.2, -1.5, "watch"), (-3.0, -4.0, None), (0.5, -1.0, "good")]
)
def test_displacement(chosen: float, rejected: float, level: str | None) -> None:
    noise = np.tile([0.01, -0.01], 20)
    run = run_with(train__log_ratio_chosen=chosen + noise, train__log_ratio_rejected=rejected + noise)
    found = findings([run])
    assert [finding.level for finding in found] == ([level] if level else [])  # else it is a condition
    assert all(f"chosen {chosen:.3f}" in finding.evidence for finding in found)


def test_displacement_within_noise_is_none() -> None:
    noise = np.tile([1.0, -1.0], 20)
    run = run_with(train__log_ratio_chosen=noise - 0.01, train__log_ratio_rejected=noise - 1)
    assert findings([run]) == []


def test_overfitting() -> None:
    run = run_with(train__reward_accuracy=[0.5] * 10 + [0.95] * 30, val__reward_accuracy=[0.8])
    (found,) = findings([run])
    assert found.evidence == "last quarter 0.950, held-out 0.800"
    assert findings([run_with(train__reward_accuracy=[0.8] * 40, val__reward_accuracy=[0.9])]) == []


@pytest.mark.parametrize(
    ("rate", "level"),
    [((0.7, 0.65, 0.75), "good"), ((0.51, 0.48, 0.54), "watch"), ((0.4, 0.35, 0.45), "act")],
)
def test_win_rate(rate: tuple[float, float, float], level: str) -> None:
    run = run_with()
    assert findings([run]) == []
    run.samples["win rate"] = Estimate(*rate)
    (found,) = findings([run])
    assert found.level == level
    assert f"{rate[0]:.0%}" in found.sentence
    assert str(Estimate(*rate)) in found.evidence


def test_other_runs_and_malformed_answers() -> None:
    run = run_with()
    run.rivals = {"dpo": Estimate(0.6, 0.55, 0.65), "ipo": Estimate(0.5, 0.45, 0.55), "x": Estimate(0.3, 0.2, 0.4)}
    run.samples["malformed share"] = Estimate(0.2, 0.15, 0.25)
    run.baseline["malformed share"] = Estimate(0.05, 0.03, 0.07)
    assert ": 0.600 [0.550, 0.650] against dpo, 0.500" in findings([run])[0].evidence
    assert [(finding.level, finding.sentence) for finding in findings([run])] == [
        ("watch", "Its answers beat those of dpo, cannot be told from those of ipo, lose to those of x."),
        ("watch", "20.0% of its answers are malformed, 5.0% of the SFT model's."),
    ]


def test_what_asks_for_a_change_comes_first() -> None:
    bad = run_with("b", beta__clamped=[1.0] * 40)
    good = run_with("a", train__log_ratio_chosen=[0.5] * 20, train__log_ratio_rejected=[-1.0] * 20)
    assert [(finding.level, finding.run) for finding in findings([good, bad])] == [("act", "b"), ("good", "a")]
