"""What each part of an arm writes into the step, its place among the callbacks, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import Recorder, controlled, decision_on, preference, quiet_trainer, same_bits, weights

from app.core.errors import UserError
from app.method.dynamic_beta import Moments
from app.method.losses import IPOLoss, KTOPairLoss, SigmoidLoss, SimPOLoss
from app.method.step import StepDecision
from callbacks import (
    BetaScheduler,
    ExplicitRewardGap,
    PairFilter,
    ReferenceWeights,
    RewardGapStatistics,
    ScoreWeights,
    StandardisedMargin,
)
from datamodules import PreferenceData


class Log:
    """Stands where callbacks log to, and keeps what they say."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def log(self, name: str, value: Any) -> None:
        self.seen[name] = float(value)


def decided(decision: StepDecision, *callbacks: Any) -> tuple[StepDecision, dict[str, float]]:
    log = Log()
    for callback in callbacks:
        callback.on_reward_gaps(None, log, decision)
    return decision, log.seen


def start(*gaps: float, **labels: Sequence[object]) -> StepDecision:
    decision = decision_on(gaps, labels=labels)
    decision.moments = Moments(0.0, 2.0)
    return decision


def run(folder: Path, model: str, *callbacks: Callback, steps: int = 3, tokens: int = 8192, **settings: Any) -> Any:
    recorder = Recorder()
    trainer = quiet_trainer(folder, [*callbacks, recorder], max_steps=steps)
    module = preference(model, **settings)
    trainer.fit(module, controlled(30, micro_batch_tokens=tokens))
    return module, recorder.decisions, trainer.callback_metrics


def test_clamps_are_counted_over_the_kept_pairs_only() -> None:
    decision = start(-4.0, 1.0, 2.0, math.nan, -5.0)
    decision.kept = torch.tensor([True, True, True, False, False])
    scheduler = BetaScheduler(level="instance")
    _, seen = decided(decision, scheduler)
    assert decision.beta.tolist() == pytest.approx([1e-3, 0.16, 0.22, 0.1, 1e-3])
    assert seen["beta/clamped"] == pytest.approx(1 / 3)
    decision.kept = torch.tensor([False, True, True, False, False])
    assert decided(decision, scheduler)[1]["beta/clamped"] == 0.0
    assert scheduler.state_dict() == {"clamped_steps": 1}


def test_missing_statistics_name_who_asks_and_the_cure() -> None:
    decision = start(1.0)
    decision.moments = None
    constant = BetaScheduler(m0=1.0, z_normalised=True)
    for asker in (PairFilter(seed=0), BetaScheduler(), constant, StandardisedMargin()):
        who = type(asker).__name__
        with pytest.raises(UserError, match=f"{who} needs the running.*`--statistics RewardGapStatistics`"):
            decided(decision, asker)


def test_the_control_moves_the_weight_of_the_loss_and_not_beta() -> None:
    arm, _ = decided(start(1.0, 2.0), BetaScheduler())
    control, seen = decided(start(1.0, 2.0), BetaScheduler(weight_matched=True))
    assert control.beta.tolist() == [0.1, 0.1]
    assert control.loss_weight.tolist() == pytest.approx((arm.beta / 0.1).tolist())
    assert arm.loss_weight.tolist() == [1.0, 1.0]
    assert seen["beta/loss_weight"] == pytest.approx(1.9)


def doubted(step: int, flipped: int) -> StepDecision:
    """Forty pairs whose reference is sure of all of them, and at odds with the labels of the first `flipped`."""
    decision = start(*[0.0] * 40, math.nan)
    sizes = 0.05 + 0.05 * ((torch.arange(40, dtype=torch.float64) * 7 + step) % 40)  # large and small among both
    signs = torch.ones(40).index_fill_(0, torch.arange(flipped), -1.0)
    decision.reference_margin = torch.cat([sizes * signs, torch.tensor([math.nan])])
    return decision


def test_pairs_whose_label_the_reference_doubts_lose_their_weight() -> None:
    callback = ReferenceWeights()
    for step in range(4):
        decision, seen = decided(doubted(step, 8), callback)
    weights = decision.loss_weight[:40]
    assert 0.1 < seen["filter/flip_rate"] < 0.25
    assert float(weights[:8].sum()) < 0.1 * float(weights.sum())
    assert float(weights.mean()) == pytest.approx(1.0)
    assert decision.kept.tolist() == [True] * 40 + [False]
    assert decision.beta.tolist() == pytest.approx([0.1] * 41)
    with pytest.raises(ValueError, match="window must be a whole number from 1"):
        ReferenceWeights(window=0)


def test_the_reference_of_the_last_steps_counts_also_after_a_resume() -> None:
    before, after, short = ReferenceWeights(), ReferenceWeights(), ReferenceWeights(window=1)
    for step in range(3):
        decided(doubted(step, 8), before)
        decided(doubted(step, 8), short)
    after.load_state_dict(before.state_dict())
    on, resumed, forgotten = (decided(doubted(3, 0), each)[0].loss_weight for each in (before, after, short))
    assert on.tolist() == resumed.tolist()
    assert on.tolist() != forgotten.tolist()


class SureReference(Callback):
    """The random model knows nothing of the pairs: here, its margins speak for four labels of five."""

    def on_reward_gaps(self, trainer: object, pl_module: object, decision: StepDecision) -> None:
        assert decision.reference_margin is not None
        signs = torch.tensor([-1.0 if int(id[-1]) < 2 else 1.0 for id in decision.pair_ids])
        decision.reference_margin = decision.reference_margin.abs() * signs


def test_weights_by_the_reference_do_not_depend_on_how_a_step_is_cut(tiny_llama: str, tmp_path: Path) -> None:
    _, decisions, _ = run(tmp_path / "whole", tiny_llama, SureReference(), ReferenceWeights())
    _, others, _ = run(tmp_path / "cut", tiny_llama, SureReference(), ReferenceWeights(), tokens=128)
    for one, other in zip(decisions, others, strict=True):
        assert one.loss_weight.tolist() == pytest.approx(other.loss_weight.tolist(), abs=1e-4)
    assert any(float(one.loss_weight.std()) > 0.1 for one in decisions)
    with pytest.raises(UserError, match="ReferenceWeights: SimPOLoss has no reference"):
        run(tmp_path / "simpo", tiny_llama, ReferenceWeights(), loss=SimPOLoss())


def test_a_constant_m0_needs_no_statistics() -> None:
    decision = start(1.0, 3.0)
    decision.moments = None
    assert decided(decision, BetaScheduler(m0=1.0))[0].beta.tolist() == pytest.approx([0.16, 0.16])


@pytest.mark.parametrize("by", ["random", "head", "tail", "both"])
def test_these_filters_need_no_statistics_and_have_no_sample_size(by: Any) -> None:
    decision = start(-4.0, 1.0, 2.0, math.nan, 6.0)
    decision.moments = None
    _, seen = decided(decision, PairFilter(0.5, seed=0, by=by))
    assert decision.kept_count == 2
    assert not decision.kept[3]
    assert seen == {}
    expected = [0.0, 0.0, 0.0, -math.inf, 0.0] if by == "random" else None
    assert (None if decision.log_weights is None else decision.log_weights.tolist()) == expected


def test_the_random_filter_ignores_the_gaps() -> None:
    kept = [
        decided(start(*gaps), PairFilter(0.5, seed=4, by="random"))[0].kept.tolist()
        for gaps in ([0.0] * 6, [9.0, -9.0, 3.0, 2.0, 1.0, 0.0])
    ]
    assert kept[0] == kept[1]


def test_an_explicit_reward_moves_statistics_filter_and_beta_but_not_the_gap(
    tiny_llama: str, tmp_path: Path
) -> None:
    hooks = [ExplicitRewardGap(), RewardGapStatistics(), PairFilter(0.5, seed=1), BetaScheduler()]
    _, decisions, metrics = run(tmp_path, tiny_llama, *hooks, max_grad_norm=None, lr=0.05)
    columns = [decisions[0].labels[f"{side}_reward"] for side in ("chosen", "rejected")]
    first = [chosen - rejected for chosen, rejected in zip(*columns, strict=True)]
    assert decisions[0].discrepancy.tolist() == pytest.approx(first)
    assert decisions[0].gaps.tolist() == [0.0] * 10
    assert decisions[0].moments is not None
    assert decisions[0].moments.mean == pytest.approx(sum(first) / 10)
    for decision in decisions:
        assert decision.moments is not None
        deviation = float(decision.discrepancy[decision.kept].mean()) - decision.moments.mean
        assert decision.beta_used == pytest.approx(max(0.1 * (1 + 0.6 * deviation), 1e-3))
    logits = decisions[-1].beta * decisions[-1].gaps
    loss = torch.nn.functional.softplus(-logits)[decisions[-1].kept].mean()
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-6)


def test_a_reward_that_is_not_there_is_named() -> None:
    gap = ExplicitRewardGap("score", "score_rejected")
    with pytest.raises(UserError, match="no column 'score'; it has these: flipped, kind"):
        decided(unmeasured(flipped=[True, False], kind=["a", "b"]), gap)
    with pytest.raises(UserError, match="it has these: none"):
        decided(unmeasured(), gap)
    for wrong in (None, "3", True, math.nan, [1]):
        labels: dict[str, list[object]] = {"score": [1, 2.5], "score_rejected": [0.5, wrong]}
        with pytest.raises(UserError, match=r"'score_rejected' of pair pair-1 holds .*finite number"):
            decided(unmeasured(**labels), gap)


@pytest.mark.parametrize("kind", [ExplicitRewardGap, ScoreWeights])
def test_scores_are_checked_before_the_first_step(kind: Any, tiny_llama: str, tmp_path: Path) -> None:
    pair = {"chosen": "the fox", "rejected": "the owl", "bad": 0}
    rows = [pair | {"prompt": f"tell me {number}", "good": number or None} for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(tmp_path / "pairs.jsonl"), batch_size=2, seed=1)
    trainer = quiet_trainer(tmp_path, [kind(chosen="good", rejected="bad")], max_steps=1)
    with pytest.raises(UserError, match=r"'good' of pair pairs\.jsonl:1 holds None"):
        trainer.fit(preference(tiny_llama), data)
    assert trainer.global_step == 0


def unmeasured(**labels: Sequence[object]) -> StepDecision:
    decision = start(1.0, 2.0, **labels)
    decision.moments = None
    return decision


def test_an_explicit_reward_after_the_statistics_is_refused() -> None:
    with pytest.raises(UserError, match=r"put it before RewardGapStatistics"):
        decided(start(1.0, chosen_reward=[1.0], rejected_reward=[0.0]), ExplicitRewardGap())


def test_the_margin_follows_the_gap_and_leaves_beta(tiny_llama: str, tmp_path: Path) -> None:
    hooks = [RewardGapStatistics(), StandardisedMargin(alpha=0.5, gamma=0.2)]
    _, decisions, metrics = run(tmp_path, tiny_llama, *hooks, lr=0.05)
    last = decisions[-1]
    expected = 0.2 + 0.5 * (last.gaps - last.moments.mean) / last.moments.std
    assert last.margin.tolist() == pytest.approx(expected.tolist())
    loss = torch.nn.functional.softplus(-(0.1 * last.gaps - expected)).mean()
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_a_margin_without_a_logit_is_refused(sft_weight: float, tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="StandardisedMargin: IPOLoss has no logit"):
        run(
            tmp_path,
            tiny_llama,
            RewardGapStatistics(),
            StandardisedMargin(),
            loss=IPOLoss(),
            sft_weight=sft_weight,
        )


@pytest.mark.parametrize(
    ("loss", "sft_weight"), [(KTOPairLoss(), 0.0), (SigmoidLoss(), 0.3), (SimPOLoss(), 0.3), (KTOPairLoss(), 0.3)]
)
def test_micro_batches_change_nothing_under_losses_of_the_batch(
    loss: Any, sft_weight: float, tiny_llama: str, tmp_path: Path
) -> None:
    one, many = (
        run(
            tmp_path,
            tiny_llama,
            *(RewardGapStatistics(), PairFilter(0.5, seed=1), BetaScheduler(level="instance", weight_matched=True)),
            tokens=tokens,
            loss=loss,
            sft_weight=sft_weight,
            lr=0.05,
        )
        for tokens in (8192, 115)
    )
    assert float(one[2]["train/loss"]) == pytest.approx(float(many[2]["train/loss"]), rel=1e-4)
    for name, tensor in weights(one[0]).items():
        torch.testing.assert_close(tensor, weights(many[0])[name], rtol=1e-3, atol=1e-5)


def test_the_sft_term_reaches_the_gradient(tiny_llama: str, tmp_path: Path) -> None:
    plain, _, _ = run(tmp_path, tiny_llama, steps=1)
    pulled, _, _ = run(tmp_path, tiny_llama, steps=1, sft_weight=0.5)
    assert not same_bits(weights(plain), weights(pulled))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PairFilter(by="middle"), "by must be one of gaussian, random"),  # type: ignore[arg-type]
        (lambda: BetaScheduler(level="pair"), "level must be"),  # type: ignore[arg-type]
        (lambda: BetaScheduler(alpha=math.nan), "alpha must be a finite number"),
        (lambda: StandardisedMargin(alpha=math.inf), "alpha must be a finite number"),
        (lambda: preference("anywhere", sft_weight=-1.0), "sft_weight must be a finite number from 0"),
    ],
)
def test_wrong_settings_of_the_parts_are_refused_at_once(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
