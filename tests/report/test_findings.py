"""Each finding where its number calls for it, and not where it does not."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_runs import audit_of, run_with

from app.core.intervals import Estimate, share_over, wilson
from app.report import beta_checks, policy_checks
from app.report.findings import findings


def test_beta_at_its_floor_and_its_ceiling() -> None:
    on_floor = [0.1] * 85 + [0.001] * 15
    found = beta_checks.beta_at_its_floor(run_with(beta__used=on_floor, beta__floor=[0.001] * 100))
    assert found is not None
    assert found.level == "act"
    assert found.sentence == "β sat at its floor of 0.001 in 15% of steps."
    assert found.evidence == "15 of 100 steps"
    assert "lower schedule.alpha" in found.advice
    rarely = run_with(beta__used=[0.1] * 97 + [0.001] * 3, beta__floor=[0.001])
    found = beta_checks.beta_at_its_floor(rarely)
    assert found is not None
    assert found.level == "watch"
    assert beta_checks.beta_at_its_floor(run_with(beta__used=[0.1] * 9, beta__floor=[0.001])) is None
    assert beta_checks.beta_at_its_floor(run_with(beta__used=[0.001] * 9)) is None  # no schedule, no floor
    above = run_with(beta__used=[0.2] * 5 + [0.1] * 5, beta__ceiling=[0.2])
    found = beta_checks.beta_at_its_ceiling(above)
    assert found is not None
    assert "50% of steps" in found.sentence
    # a float32 of the log is not quite the bound
    single = run_with(beta__used=[float(np.float32(0.001))] * 9, beta__floor=[0.001])
    assert beta_checks.beta_at_its_floor(single) is not None


@pytest.mark.parametrize(
    ("beta", "level", "word"),
    [
        ([0.1, 0.1005] * 20, "watch", "hardly left"),
        ([0.02, 0.3] * 20, "act", "jumped by 280%"),
        (list(np.linspace(0.08, 0.12, 40)), "good", "followed the data"),
    ],
)
def test_how_beta_moved(beta: list[float], level: str, word: str) -> None:
    run = run_with(beta__used=beta, beta__base=[0.1], beta__clamped=[0.0])
    found = beta_checks.how_beta_moved(run)
    assert found is not None
    assert (found.level, word in found.sentence) == (level, True)
    del run.curves["beta/clamped"]  # plain DPO: its β is not meant to move
    assert beta_checks.how_beta_moved(run) is None


def test_few_pairs_carry_the_weight() -> None:
    run = run_with(audit=audit_of(), filter__effective_sample_size=[15.0] * 20 + [3.2] * 20)
    found = beta_checks.few_pairs_carry_the_weight(run)
    assert found is not None
    assert "worth 20% of a batch" in found.sentence
    assert found.evidence.endswith("3.2 of 16 pairs")
    run.audit = None
    assert beta_checks.few_pairs_carry_the_weight(run) is None


def test_a_pair_seen_often_counts_once() -> None:
    once = share_over(np.arange(50), np.arange(50) < 10)
    assert share_over(np.tile(np.arange(50), 20), np.tile(np.arange(50) < 10, 20)) == once
    assert once == wilson(0.2, 50)


def test_beta_far_from_base_and_advice_for_the_schedule_of_the_run() -> None:
    run = run_with(beta__used=[0.01] * 90 + [0.05] * 10, beta__base=[0.01], beta__clamped=[0.0])
    found = beta_checks.beta_far_from_base(run)
    assert found is not None
    assert "above 3·β0 in 10%, below β0/3 in 0%; largest 5·β0" in found.evidence
    assert "z_normalised" in found.advice
    entry = {"class_path": "callbacks.BetaScheduler", "init_args": {"z_normalised": True}}
    run.config = {"schedule": entry}
    found = beta_checks.beta_far_from_base(run)
    assert found is not None
    assert found.advice.endswith(": lower schedule.alpha.")
    near = run_with(beta__used=[0.01] * 96 + [0.05] * 4, beta__base=[0.01], beta__clamped=[0.0])
    assert beta_checks.beta_far_from_base(near) is None


def test_who_is_dropped() -> None:
    audit = audit_of()
    run = run_with(audit=audit, filter__kept_fraction=[0.8])
    found = beta_checks.who_is_dropped(run)
    assert found is not None
    assert found.level == "good"
    share = 1 - audit.kept[audit.flipped].mean()
    assert f"flipped {share:.3f}" in found.evidence
    assert "and never the others" in found.sentence  # of the synthetic run's clean pairs none is dropped
    run.audit = audit.assign(kept=np.arange(len(audit)) % 5 > 0)
    found = beta_checks.who_is_dropped(run)
    assert found is not None
    assert found.level == "watch"
    run.audit = audit.drop(columns="flipped")
    assert beta_checks.who_is_dropped(run) is None
    unfit = audit.assign(gap=np.where(audit.kept, audit.gap, np.nan))  # no filter left these out
    assert beta_checks.who_is_dropped(run_with(audit=unfit, filter__kept_fraction=[0.8])) is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "level"), [(-0.2, -1.5, "watch"), (-3.0, -4.0, "act"), (0.5, -1.0, "good")]
)
def test_displacement(chosen: float, rejected: float, level: str) -> None:
    noise = np.tile([0.01, -0.01], 20)
    run = run_with(train__log_ratio_chosen=chosen + noise, train__log_ratio_rejected=rejected + noise)
    found = policy_checks.chosen_probability_falls(run)
    assert found is not None
    assert found.level == level
    assert f"chosen {chosen:.3f}" in found.evidence


def test_displacement_within_noise_is_none() -> None:
    noise = np.tile([1.0, -1.0], 20)
    run = run_with(train__log_ratio_chosen=noise - 0.01, train__log_ratio_rejected=noise - 1)
    assert policy_checks.chosen_probability_falls(run) is None


def test_accuracy() -> None:
    run = run_with(train__reward_accuracy=[0.5] * 10 + [0.99] * 30, val__reward_accuracy=[0.8])
    found = policy_checks.accuracy_is_saturated(run)
    assert found is not None
    assert found.sentence.startswith("99.0%")
    found = policy_checks.overfitting(run)
    assert found is not None
    assert found.evidence == "last quarter 0.990, held-out 0.800"
    calm = run_with(train__reward_accuracy=[0.8] * 40, val__reward_accuracy=[0.9])
    assert policy_checks.accuracy_is_saturated(calm) is None
    assert policy_checks.overfitting(calm) is None


@pytest.mark.parametrize(
    ("rate", "level"),
    [((0.7, 0.65, 0.75), "good"), ((0.51, 0.48, 0.54), "watch"), ((0.4, 0.35, 0.45), "act")],
)
def test_win_rate(rate: tuple[float, float, float], level: str) -> None:
    run = run_with()
    assert policy_checks.against_the_baseline(run) is None
    run.samples["win rate"] = Estimate(*rate)
    found = policy_checks.against_the_baseline(run)
    assert found is not None
    assert found.level == level
    assert f"{rate[0]:.0%}" in found.sentence
    assert str(Estimate(*rate)) in found.evidence


def test_against_other_runs() -> None:
    run = run_with()
    run.rivals = {"dpo": Estimate(0.6, 0.55, 0.65), "ipo": Estimate(0.5, 0.45, 0.55), "x": Estimate(0.3, 0.2, 0.4)}
    found = policy_checks.against_other_runs(run)
    assert found is not None
    assert found.level == "watch"
    assert found.sentence == (
        "Its answers beat those of dpo, cannot be told from those of ipo, lose to those of x."
    )


def test_malformed_answers_speed_and_lost_pairs() -> None:
    run = run_with(train__tokens_per_second=[100.0] * 20 + [50.0] * 20, train__nonfinite_pairs=[0.0, 3.0])
    run.samples["malformed share"] = Estimate(0.2, 0.15, 0.25)
    run.baseline["malformed share"] = Estimate(0.05, 0.03, 0.07)
    told = [finding.sentence for finding in findings([run])]
    assert "20.0% of its answers are malformed, 5.0% of the SFT model's." in told
    assert "The run ended at 50% of the speed at which it began." in told
    assert "3 times a pair had no finite gap and was left out." in told
    quiet = run_with(train__tokens_per_second=[100.0] * 40, train__nonfinite_pairs=[0.0])
    assert findings([quiet]) == []


def test_what_asks_for_a_change_comes_first() -> None:
    bad = run_with("b", beta__used=[0.001] * 9, beta__floor=[0.001])
    good = run_with("a", train__log_ratio_chosen=[0.5] * 20, train__log_ratio_rejected=[-1.0] * 20)
    assert [finding.level for finding in findings([good, bad])] == ["act", "good"]
