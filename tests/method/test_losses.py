"""Losses and their gradients by hand, their stability in float32, and the record of log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from app.method.dynamic_beta import Moments, RunningMoments, batch_beta
from app.method.losses import (
    HingeLoss,
    IPOLoss,
    KTOPairLoss,
    LengthNormalisedIPOLoss,
    RobustLoss,
    SigmoidLoss,
    SimPOLoss,
    SPPOHardLoss,
)
from app.method.pair_loss import LogitLoss, PairLogps, PairLoss


def with_gap(gap: torch.Tensor) -> PairLogps:
    """Pairs of one-token responses whose gap, normalised or not, is `gap` [B]."""
    zero, one = torch.zeros_like(gap), torch.ones(gap.shape, dtype=torch.int64)
    return PairLogps(gap, zero, zero, zero, one, one)


def hand_pairs() -> PairLogps:
    def column(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return PairLogps(
        policy_chosen=column(-10, -20, -15, -8),
        policy_rejected=column(-12, -19, -15.5, -11),
        reference_chosen=column(-11, -19.5, -15, -9),
        reference_rejected=column(-11, -20, -14.5, -10),
        chosen_tokens=torch.tensor([5, 4, 3, 2]),
        rejected_tokens=torch.tensor([4, 4, 5, 5]),
    )


LOSSES: list[PairLoss] = [
    SigmoidLoss(),
    SigmoidLoss(label_smoothing=0.2),
    RobustLoss(),
    HingeLoss(),
    IPOLoss(),
    LengthNormalisedIPOLoss(),
    SimPOLoss(gamma=1.0),
    SPPOHardLoss(),
    KTOPairLoss().for_batch(hand_pairs()),
    SigmoidLoss().with_sft(0.7),
]
NAMES = [
    *("dpo", "cdpo", "robust", "hinge", "ipo", "ipo_length_normalised", "simpo", "sppo_hard", "kto_pair", "sft"),
]
TAKES_MARGIN = [True, True, True, True, False, False, True, False, False, True]


def constant(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, value, dtype=torch.float64)


def test_gap_by_hand() -> None:
    pairs = hand_pairs()
    assert [ratios.tolist() for ratios in pairs.log_ratios] == [[1.0, -0.5, 0.0, 1.0], [-1.0, 1.0, -1.0, -1.0]]
    assert pairs.reward_gap.tolist() == [2.0, -1.5, 1.0, 2.0]
    assert pairs.normalised_gap.tolist() == pytest.approx([1.0, -0.25, -1.9, -1.8])


def test_without_a_reference_only_the_normalised_gap_exists() -> None:
    pairs = hand_pairs()
    pairs.reference_chosen = pairs.reference_rejected = None
    assert pairs.normalised_gap.shape == (4,)
    for name in ("reward_gap", "normalised_reward_gap", "log_ratios"):
        with pytest.raises(ValueError, match="reference"):
            getattr(pairs, name)
    assert SimPOLoss()(pairs, constant(2.0, pairs.policy_chosen)).shape == (4,)


def test_which_losses_read_the_reference() -> None:
    assert [loss.needs_reference for loss in LOSSES] == [True] * 6 + [False] + [True] * 3


def test_discrepancy_is_what_beta_acts_on() -> None:
    pairs = hand_pairs()
    for loss in LOSSES[:5]:
        assert torch.equal(loss.discrepancy(pairs), pairs.reward_gap)
    # 1/5 + 1/4, −0.5/4 − 1/4, 0 + 1/5, 1/2 + 1/5
    assert LOSSES[5].discrepancy(pairs).tolist() == pytest.approx([0.45, -0.375, 0.2, 0.7])
    assert torch.equal(LOSSES[6].discrepancy(pairs), pairs.normalised_gap)


def test_select_and_cat_keep_the_pairs_together() -> None:
    pairs = hand_pairs()
    mask = torch.tensor([True, False, True, True])
    assert pairs.select(mask).reward_gap.tolist() == [2.0, 1.0, 2.0]
    assert pairs.select(torch.tensor([3, 1])).chosen_tokens.tolist() == [2, 4]
    joined = PairLogps.cat([pairs.select(torch.tensor([0])), pairs.select(torch.tensor([1, 2, 3]))])
    for loss in LOSSES:
        beta = constant(0.3, pairs.policy_chosen)
        assert torch.equal(loss(joined, beta), loss(pairs, beta))
    pairs.reference_chosen = pairs.reference_rejected = None
    assert PairLogps.cat([pairs, pairs.select(mask)]).reference_chosen is None
    assert pairs.select(mask).normalised_gap.shape == (3,)


def test_loss_and_gradient_of_a_filtered_step_by_hand() -> None:
    gap = torch.tensor([2.0, -1.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([True, False, True, True])
    beta = batch_beta(0.1, 0.6, gap[kept], Moments(0.9875, 1.94)).expand(3)
    assert beta[0].item() == pytest.approx(0.14075)
    losses = SigmoidLoss()(with_gap(gap).select(kept), beta)
    assert losses.tolist() == pytest.approx([0.5622699, 0.6252465, 0.5622699], abs=1e-6)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(0.5832621, abs=1e-6)
    assert gap.grad is not None
    assert gap.grad.tolist() == pytest.approx([-0.0201782, 0.0, -0.0218102, -0.0201782], abs=1e-6)
    assert gap.grad[1] == 0.0


def test_plain_dpo_by_hand() -> None:
    gap = torch.tensor([2.0, -1.5, 1.0, 2.0], dtype=torch.float64)
    assert SigmoidLoss()(with_gap(gap), constant(0.1, gap)).mean().item() == pytest.approx(0.6529079, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_no_gradient_flows_through_beta(loss: PairLoss) -> None:
    def total(gap: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return loss(with_gap(gap), beta).sum()

    gap = torch.tensor([0.7, -1.5, 0.2], dtype=torch.float64, requires_grad=True)
    # A β that hangs on the gaps, as it would if it were not cut off.
    beta = 0.2 * (1 + 0.1 * gap)
    total(gap, beta).backward()
    assert gap.grad is not None
    step, frozen = 1e-6, beta.detach()
    for index in range(3):
        moved = torch.zeros(3, dtype=torch.float64)
        moved[index] = step
        difference = total(gap.detach() + moved, frozen) - total(gap.detach() - moved, frozen)
        assert gap.grad[index].item() == pytest.approx((difference / (2 * step)).item(), rel=1e-6, abs=1e-8)


def test_without_alpha_and_filter_the_step_is_dpo_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    start = 3 * torch.randn(64, generator=generator)
    plain, ours = start.clone().requires_grad_(), start.clone().requires_grad_()
    expected = -F.logsigmoid(0.1 * plain)
    expected.mean().backward()
    beta = batch_beta(0.1, 0.0, ours, RunningMoments().update(ours)).expand(64)
    losses = SigmoidLoss()(with_gap(ours).select(torch.ones(64, dtype=torch.bool)), beta)
    losses.mean().backward()
    assert torch.equal(losses, expected)
    assert plain.grad is not None
    assert ours.grad is not None
    assert torch.equal(ours.grad, plain.grad)


def test_gradient_scale_is_the_weight_that_gradient_filters_sort_by() -> None:
    gap = torch.tensor([-4.0, -1.0, 0.0, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    SigmoidLoss()(with_gap(gap), constant(0.1, gap)).sum().backward()
    assert gap.grad is not None
    scale = -gap.grad / 0.1
    assert scale.tolist() == pytest.approx([0.5987, 0.5250, 0.5, 0.4502, 0.3543], abs=1e-4)
    assert scale.argmax() == 0  # "head" drops the smallest gap
    assert scale.argmin() == 4  # "tail" drops the largest


def test_variants_by_hand() -> None:
    gap, beta = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    up, down = math.log1p(math.exp(-1)), math.log1p(math.exp(1))  # β·h = 1
    half = math.log(2)

    def values(loss: PairLoss) -> list[float]:
        return loss(with_gap(gap), beta).tolist()

    assert values(SigmoidLoss()) == pytest.approx([half, up])
    assert values(SigmoidLoss(0.25)) == pytest.approx([half, 0.75 * up + 0.25 * down])
    assert values(RobustLoss(0.25)) == pytest.approx([half, (0.75 * up - 0.25 * down) / 0.5])
    assert values(HingeLoss()) == [1.0, 0.0]
    assert values(IPOLoss()) == [1.0, 1.0]  # target 1/(2·0.5) = 1
    assert values(SimPOLoss(gamma=1.0)) == pytest.approx([down, half])


def test_robust_loss_is_unbiased_under_swapped_labels() -> None:
    gap = torch.tensor([1.7], dtype=torch.float64)
    beta, rate = constant(0.4, gap), 0.15
    noisy = (1 - rate) * RobustLoss(rate)(with_gap(gap), beta) + rate * RobustLoss(rate)(with_gap(-gap), beta)
    assert noisy.item() == pytest.approx(SigmoidLoss()(with_gap(gap), beta).item(), abs=1e-12)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 16.0), (0.22, 1.6198347)])
def test_ipo_under_a_dynamic_beta(beta: float, expected: float) -> None:
    gap = torch.tensor([1.0], dtype=torch.float64)
    assert IPOLoss()(with_gap(gap), constant(beta, gap)).item() == pytest.approx(expected, abs=1e-6)


def test_length_normalised_ipo_counts_tokens() -> None:
    pairs = hand_pairs()
    losses = LengthNormalisedIPOLoss()(pairs, constant(1.0, pairs.policy_chosen))
    assert losses.tolist() == pytest.approx([0.05**2, 0.875**2, 0.3**2, 0.2**2])


def test_dynamic_beta_leaves_the_margin_of_simpo() -> None:
    pairs = hand_pairs().select(torch.tensor([0]))  # normalised gap 1
    for beta in (1.0, 2.0, 3.5):
        loss = SimPOLoss(gamma=0.8)(pairs, constant(beta, pairs.policy_chosen)).item()
        assert loss == pytest.approx(math.log1p(math.exp(0.8 - beta)))


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_every_pair_uses_its_own_beta(loss: PairLoss) -> None:
    pairs = hand_pairs()
    betas = torch.tensor([0.05, 0.1, 0.2, 0.4], dtype=torch.float64)
    together = loss(pairs, betas)
    for index in range(4):
        alone = loss(pairs.select(torch.tensor([index])), betas[index])
        assert together[index].item() == pytest.approx(alone.item(), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_float32_stays_finite_for_a_huge_gap(loss: PairLoss, sign: float) -> None:
    gap = torch.tensor([sign * 1e6, sign * 1e7, sign * 200.0], requires_grad=True)
    beta = torch.tensor([1.0, 0.1, 0.5], dtype=torch.float64)
    losses = loss(with_gap(gap), beta)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    assert gap.grad is not None
    assert torch.isfinite(gap.grad).all()


def test_float32_sigmoid_is_linear_where_the_model_is_badly_wrong() -> None:
    gap = torch.tensor([-1e6, 1e6])
    assert SigmoidLoss()(with_gap(gap), constant(1.0, gap)).tolist() == [1e6, 0.0]


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_a_dropped_pair_with_nan_poisons_neither_loss_nor_gradient(loss: PairLoss) -> None:
    gap = torch.tensor([1.0, 2.0, math.nan], dtype=torch.float64, requires_grad=True)
    kept = torch.isfinite(gap)
    losses = loss(with_gap(gap).select(kept), constant(0.3, gap[kept]))
    losses.mean().backward()
    assert torch.isfinite(losses).all()
    assert gap.grad is not None
    assert torch.isfinite(gap.grad).all()
    assert gap.grad[2] == 0.0


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_no_pair_gives_no_loss(loss: PairLoss) -> None:
    nothing = torch.tensor([], dtype=torch.int64)
    pairs = hand_pairs().select(nothing)
    assert loss(pairs, pairs.policy_chosen).sum().item() == 0.0


@pytest.mark.parametrize("make", [SigmoidLoss, RobustLoss])
@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_out_of_range_is_refused(make: Callable[..., PairLoss], smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        make(label_smoothing=smoothing)


@pytest.mark.parametrize("gamma", [-0.1, math.inf, math.nan])
def test_a_margin_out_of_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        SimPOLoss(gamma=gamma)


@pytest.mark.parametrize(("loss", "takes"), list(zip(LOSSES, TAKES_MARGIN, strict=True)), ids=NAMES)
def test_a_margin_is_subtracted_from_the_logit_or_refused(loss: PairLoss, takes: bool) -> None:
    pairs, beta = hand_pairs(), torch.full((4,), 0.5, dtype=torch.float64)
    margin = torch.tensor([0.3, -0.2, 0.0, 1.0], dtype=torch.float64)
    assert loss.takes_margin is takes
    if not takes:
        with pytest.raises(ValueError, match=f"{loss} has no logit"):
            loss(pairs, beta, margin)
        return
    # a margin m is a gap that is m/β smaller: per token where the loss counts so
    moved = hand_pairs()
    per_token = moved.rejected_tokens if isinstance(loss, SimPOLoss) else 1
    moved.policy_rejected = moved.policy_rejected + margin / beta * per_token
    assert loss(pairs, beta, margin).tolist() == pytest.approx(loss(moved, beta).tolist(), abs=1e-12)
    assert loss(pairs, beta, 0 * margin).tolist() == loss(pairs, beta).tolist()


def test_no_gradient_flows_through_the_margin() -> None:
    gap = torch.tensor([0.7, -1.5], dtype=torch.float64, requires_grad=True)
    SigmoidLoss()(with_gap(gap), constant(0.2, gap), 0.3 * gap).sum().backward()
    expected = -0.2 * torch.sigmoid(-(0.2 * gap.detach() - 0.3 * gap.detach()))
    assert gap.grad is not None
    assert gap.grad.tolist() == pytest.approx(expected.tolist())


def test_sppo_by_hand() -> None:
    # log-ratios (1, −1), (−0.5, 1), (0, −1), (1, −1); β = 0.5 sets the targets 1 and −1
    losses = SPPOHardLoss()(hand_pairs(), constant(0.5, torch.ones(4)))
    assert losses.tolist() == [0.0, 1.5**2 + 2.0**2, 1.0, 0.0]


def test_kto_by_hand() -> None:
    # means of the log-ratios: chosen (1 − 0.5 + 0 + 1)/4 = 0.375, rejected (−1 + 1 − 1 − 1)/4 < 0, so 0
    losses = KTOPairLoss().for_batch(hand_pairs())(hand_pairs(), constant(2.0, torch.ones(4)))

    def one_minus_sigmoid(x: float) -> float:
        return 1 - 1 / (1 + math.exp(-x))

    ratios = [(1.0, -1.0), (-0.5, 1.0), (0.0, -1.0), (1.0, -1.0)]
    expected = [0.5 * (one_minus_sigmoid(2 * w) + one_minus_sigmoid(2 * (0.375 - r))) for w, r in ratios]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_divergences_of_kto_are_those_of_the_whole_batch() -> None:
    pairs, beta = hand_pairs(), constant(0.4, torch.ones(4))
    loss = KTOPairLoss().for_batch(pairs)
    parts = [loss(pairs.select(torch.tensor(i)), beta[i]) for i in ([0, 1], [2], [3])]
    assert torch.equal(torch.cat(parts), loss(pairs, beta))
    alone = KTOPairLoss().for_batch(pairs.select(torch.tensor([1])))
    assert not torch.equal(alone(pairs, beta), loss(pairs, beta))


def test_kto_leaves_out_bad_pairs_takes_none_and_wants_the_batch() -> None:
    pairs, beta = hand_pairs(), constant(0.4, torch.ones(4))
    spoilt = PairLogps.cat([pairs, pairs.select(torch.tensor([0]))])
    spoilt.policy_chosen[4] = math.nan
    assert torch.equal(KTOPairLoss().for_batch(spoilt)(pairs, beta), KTOPairLoss().for_batch(pairs)(pairs, beta))
    nothing = KTOPairLoss().for_batch(pairs.select(torch.tensor([], dtype=torch.int64)))
    assert torch.isfinite(nothing(pairs, beta)).all()
    with pytest.raises(ValueError, match="for_batch"):
        KTOPairLoss()(pairs, beta)


def test_the_divergences_carry_no_gradient() -> None:
    gap = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    KTOPairLoss().for_batch(with_gap(gap))(with_gap(gap), constant(0.5, gap)).sum().backward()
    assert gap.grad is not None
    inner = torch.sigmoid(0.5 * gap.detach())  # the rejected side is constant, its divergence 0
    assert gap.grad.tolist() == pytest.approx((-0.25 * inner * (1 - inner)).tolist())


def test_sft_term_by_hand_and_around_any_loss() -> None:
    pairs, beta = hand_pairs(), constant(0.4, torch.ones(4))
    for loss in LOSSES[:8]:
        around = loss.with_sft(2.0)
        added = around(pairs, beta) - loss(pairs, beta)
        assert added.tolist() == pytest.approx([2 * 10 / 5, 2 * 20 / 4, 2 * 15 / 3, 2 * 8 / 2])
        assert torch.equal(around.discrepancy(pairs), loss.discrepancy(pairs))
        assert (around.needs_reference, around.takes_margin, str(around)) == (
            loss.needs_reference,
            loss.takes_margin,
            str(loss),
        )
    kto = KTOPairLoss().with_sft(2.0).for_batch(pairs)
    expected = KTOPairLoss().for_batch(pairs)(pairs, beta) + 2.0 * torch.tensor([2.0, 5.0, 5.0, 4.0])
    assert kto(pairs, beta).tolist() == pytest.approx(expected.tolist())

    class Own(SigmoidLoss):
        sft_weight = 3.0  # of its own

        def for_batch(self, everyone: PairLogps) -> SigmoidLoss:
            return SigmoidLoss()

    assert torch.equal(Own().with_sft(2.0).bound(pairs)(pairs, beta), SigmoidLoss().with_sft(2.0)(pairs, beta))
    assert Own().with_sft(0.0).sft_weight == 3.0


def test_a_loss_that_averages_is_refused() -> None:
    class Mean(LogitLoss):
        def of_logits(self, logits: torch.Tensor) -> torch.Tensor:
            return -F.logsigmoid(logits).mean()

    with pytest.raises(ValueError, match=r"Mean returns a loss of shape \[\], not one per pair \[2\]"):
        Mean()(with_gap(torch.zeros(2)), torch.tensor(0.1))
