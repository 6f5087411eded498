"""Adaptive methods against golden numbers (float64, 1e-9)."""

from __future__ import annotations

import math

import pytest
import torch
from golden import golden_numbers

from app.method.losses import AlphaDPOLoss, IPOLoss, RobustLoss, SigmoidLoss, SimPOLoss
from app.method.margins import amapo_margins, gamma_po_margins
from app.method.pair_loss import PairLogps, PairLoss
from app.method.weights import (
    dr_dpo_loss,
    dr_dpo_weights,
    kldpo_weights,
    label_confidence,
    madpo_weights,
    quality_weights,
    updated_reliability,
)


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(expected: object) -> object:
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


def pairs_with(gaps: torch.Tensor) -> PairLogps:
    """Pairs whose gap, summed and per token, with and without reference, is `gaps` [n]."""
    zero, one = torch.zeros_like(gaps), torch.ones(gaps.shape, dtype=torch.int64)
    return PairLogps(gaps, zero, zero, zero, one, one)


def test_no_number_goes_unchecked() -> None:
    assert golden_numbers("adaptive").keys() == {"note", "repo", "dr_and_kl", "gamma_po", "amapo", "alpha_dpo"}


def test_repo() -> None:
    for case in golden_numbers("adaptive")["repo"]:
        swap = case["swap_probability"]
        pairs, beta = pairs_with(column(swap["gaps"])), column([swap["beta"]] * len(swap["gaps"]))
        for loss, name in ((IPOLoss(), "p_ipo"), (SimPOLoss(swap["gamma"]), "p_simpo")):
            assert torch.sigmoid(loss.label_logit(pairs, beta, None)).tolist() == close(swap[name])
        names = [str(k) for k in range(len(case["steps"][0]["reliability_before"]))]
        reliability = dict.fromkeys(names, case["initial_reliability"])
        for step in case["steps"]:
            annotators = [str(k) for k in step["annotator"]]
            assert list(reliability.values()) == close(step["reliability_before"])
            gaps = column(step["gaps"]).requires_grad_()
            pairs, beta = pairs_with(gaps), column([case["beta"]] * len(annotators))
            eta = column([reliability[k] for k in annotators])
            confidence = label_confidence(SigmoidLoss().label_logit(pairs, beta, None), eta)
            assert confidence.tolist() == close(step["confidence"])
            losses = SigmoidLoss()(pairs, beta, confidence=confidence)
            assert losses.tolist() == close(step["loss"])
            losses.mean().backward()
            assert gaps.grad is not None
            assert gaps.grad.tolist() == close(step["mean_loss_gradient"])
            reliability = updated_reliability(reliability, annotators, confidence, case["momentum"])
            assert list(reliability.values()) == close(step["reliability_after"])


@pytest.mark.parametrize(
    ("loss", "sft"), [(SigmoidLoss(), 0), (IPOLoss(), 0), (SimPOLoss(0.5), 0), (SigmoidLoss(), 0.3)]
)
def test_repo_has_the_gradient_of_the_noisy_likelihood(loss: PairLoss, sft: float) -> None:
    gaps, beta, eta = column([-3.0, 0.1, 2.0, 5.0]).requires_grad_(), column([0.4] * 4), column([0.8])
    logits = loss.label_logit(pairs_with(gaps), beta, None)
    p = torch.sigmoid(logits)
    noisy = -torch.log(eta * p + (1 - eta) * (1 - p)).sum()
    noisy = noisy - sft * gaps.sum()  # the likelihood of the chosen response is not in doubt
    ours = loss.with_sft(sft)(pairs_with(gaps), beta, confidence=label_confidence(logits, eta)).sum()
    expected, seen = (torch.autograd.grad(each, gaps, retain_graph=True)[0] for each in (noisy, ours))
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-12)


def test_a_loss_that_models_flips_has_no_swapped_form() -> None:
    with_sft_term = RobustLoss().with_sft(1.0)
    for loss in (SigmoidLoss(label_smoothing=0.1), RobustLoss(), AlphaDPOLoss(), with_sft_term):
        with pytest.raises(ValueError, match="no swapped form"):
            loss(pairs_with(column([1.0])), column([0.1]), confidence=column([0.9]))


def test_dr_dpo_and_kldpo() -> None:
    for case in golden_numbers("adaptive")["dr_and_kl"]:
        gaps = column(case["gaps"]).requires_grad_()
        losses = SigmoidLoss()(pairs_with(gaps), column([case["beta"]] * len(gaps)))
        assert float(dr_dpo_loss(losses.detach(), case["dr_temperature"])) == close(case["dr_loss"])
        weights = dr_dpo_weights(losses, case["dr_temperature"])
        assert weights.tolist() == close(case["dr_weights_times_n"])
        (gradient,) = torch.autograd.grad((weights * losses).mean(), gaps, retain_graph=True)
        assert gradient.tolist() == close(case["dr_gradient"])
        weights = kldpo_weights(losses, case["kl_temperature"])
        assert weights.tolist() == close(case["kl_weights"])
        assert float((weights * losses.detach()).mean()) == close(case["kl_loss"])


def test_gamma_po() -> None:
    for case in golden_numbers("adaptive")["gamma_po"]:
        margins = gamma_po_margins(column(case["reward_gaps"]), case["gamma0"], case["tau"])
        assert margins.tolist() == close(case["margins"])


@pytest.mark.parametrize(("gamma", "temperature"), [(0.4, 10.0), (2.0, 0.1), (5.0, 0.05)])
def test_gamma_po_solves_its_equation_also_where_plain_iteration_diverges(gamma: float, temperature: float) -> None:
    gaps = 3 * torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    margins = gamma_po_margins(gaps, gamma, temperature)
    share = torch.exp(-(gamma / temperature) * torch.sigmoid(margins - gaps))
    torch.testing.assert_close(margins, gamma * share / share.mean(), rtol=1e-9, atol=0)
    assert margins[gaps.argsort()].diff().min() >= 0  # the larger the gap, the larger the margin


def test_amapo() -> None:
    for case in golden_numbers("adaptive")["amapo"]:
        gaps, beta = column(case["gaps"]), column([case["beta"]] * len(case["gaps"]))
        margins = amapo_margins(gaps, beta)
        assert margins.tolist() == close(case["margins"])
        assert SimPOLoss(0.0)(pairs_with(gaps), beta, margins).tolist() == close(case["loss"])
    for few in ([], [1.0], [2.0, 2.0]):
        assert amapo_margins(column(few), column([2.0] * len(few))).tolist() == [0.0] * len(few)


def test_weights_by_scores() -> None:
    gap = column([-3.0, -1.0, 0.0, 1.0, 2.0, 6.0])
    weights = madpo_weights(gap, 2.0, 0.5, 1.0, 2.0)
    # by hand: beyond −τ the weight is 1, at r = 0 and at |r| = τ the factor changes nothing
    assert weights[[0, 2, 4]].tolist() == close([1.0, 1.0, 1.0])
    factor = 0.5 + 1.5 / (1 + 2 * math.exp(-1.0))  # at |r| = 1
    sigmoid = [1 / (1 + math.exp(-x)) for x in (factor, 1.0, -factor, -1.0)]
    assert weights[[3, 1]].tolist() == close([sigmoid[0] / sigmoid[1], sigmoid[2] / sigmoid[3]])
    assert weights[5] < 1 < weights[3]
    assert quality_weights(gap, 0.7).tolist() == close([1 / (1 + math.exp(-0.7 * r)) for r in gap.tolist()])


def test_alpha_dpo_as_published() -> None:
    for case in golden_numbers("adaptive")["alpha_dpo"]:
        policy, gap = column(case["policy_gap"]), column(case["gap_with_reference"])
        zero, one = torch.zeros_like(gap), torch.ones(gap.shape, dtype=torch.int64)
        pairs = PairLogps(policy.requires_grad_(), zero, policy.detach() - gap, zero, one, one)
        loss = AlphaDPOLoss(case["alpha"], case["gamma"]).for_batch(pairs)
        beta = torch.full_like(gap, case["beta"])
        seen = loss(pairs, beta)
        assert seen.tolist() == pytest.approx(case["loss"], rel=1e-9, abs=1e-12)
        seen.sum().backward()  # the logit alone carries the gradient, −β·σ(−logit): z is a constant
        assert policy.grad is not None
        logit = column(case["logit"])
        assert policy.grad.tolist() == pytest.approx((-case["beta"] * torch.sigmoid(-logit)).tolist(), rel=1e-9)


def test_alpha_dpo_without_a_spread_is_simpo() -> None:
    equal = column([-3.0, -2.0])
    pairs = PairLogps(equal, equal - 1, equal, equal - 1, *[torch.tensor([2, 4])] * 2)
    loss = AlphaDPOLoss(0.2, 1.0)
    with pytest.raises(ValueError, match="for_batch first"):
        loss(pairs, column([2.0, 2.0]))
    expected = -torch.nn.functional.logsigmoid(2.0 * pairs.normalised_gap - 1.0)
    assert loss.for_batch(pairs)(pairs, column([2.0, 2.0])).tolist() == pytest.approx(expected.tolist())
