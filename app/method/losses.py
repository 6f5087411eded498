"""Preference losses on summed log-probabilities, with β as an argument that may differ by step or by pair."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from app.method.pair_loss import LogitLoss, PairLogps, PairLoss
from app.method.ranges import FiniteFloat, NonNegativeFloat, ShareBelowHalf, checked


@checked
class SigmoidLoss(LogitLoss):
    """DPO, −log σ(β·h) (arXiv 2305.18290, eq. 7); conservative DPO (cDPO) for `label_smoothing` ε > 0.

    cDPO is (1 − ε)·−log σ(β·h) + ε·−log σ(−β·h), which assumes that a label is swapped with probability ε.
    """

    def __init__(self, label_smoothing: ShareBelowHalf = 0.0) -> None:
        self.label_smoothing = label_smoothing
        self.has_swapped_form = label_smoothing == 0.0  # cDPO mixes both forms already

    def of_logits(self, logits: Tensor) -> Tensor:
        upright, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        return (1.0 - self.label_smoothing) * upright + self.label_smoothing * swapped


@checked
class RobustLoss(LogitLoss):
    """Robust DPO (arXiv 2403.00409), an unbiased estimate of DPO's loss if labels are swapped at rate ε."""

    def __init__(self, label_smoothing: ShareBelowHalf = 0.1) -> None:
        self.label_smoothing = label_smoothing

    def of_logits(self, logits: Tensor) -> Tensor:
        # ((1 − ε)·−log σ(β·h) − ε·−log σ(−β·h)) / (1 − 2ε), which has no lower bound and can be negative
        upright, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        epsilon = self.label_smoothing
        return ((1.0 - epsilon) * upright - epsilon * swapped) / (1.0 - 2.0 * epsilon)


class HingeLoss(LogitLoss):
    """The hinge loss of SLiC (arXiv 2305.10425) on DPO's logits: max(0, 1 − β·h)."""

    has_swapped_form = True

    def of_logits(self, logits: Tensor) -> Tensor:
        return F.relu(1.0 - logits)


@checked
class SimPOLoss(LogitLoss):
    """SimPO, −log σ(β·(l_w/|y_w| − l_l/|y_l|) − γ) (arXiv 2405.14734, eq. 6); needs no reference.

    γ = `gamma` does not follow a dynamic β (the β-DPO paper says nothing of it): it is one target for all batches.
    """

    needs_reference = False
    has_swapped_form = True

    def __init__(self, gamma: NonNegativeFloat = 1.0) -> None:
        self.gamma = gamma

    def discrepancy(self, logps: PairLogps) -> Tensor:
        return logps.normalised_gap

    def of_logits(self, logits: Tensor) -> Tensor:
        return -F.logsigmoid(logits - self.gamma)


@checked
class AlphaDPOLoss(SimPOLoss):
    """α-DPO as in its authors' code: −log σ(β·(l_w/|y_w| − l_l/|y_l|) − γ − β·α·z) (arXiv 2410.10148).

    z is the per-token gap *with* reference, standardised over the global batch without gradient, where the authors'
    code averages mean and deviation over steps from zero. configs/loss/alpha_dpo.yaml has the authors' settings.
    """

    needs_reference = True
    needs_batch = True
    has_swapped_form = False  # z belongs to the pair as labelled, and the paper defines no swapped one
    _moments: tuple[Tensor, Tensor] | None = None  # mean and deviation of the batch

    def __init__(self, alpha: FiniteFloat = 0.2, gamma: NonNegativeFloat = 1.5) -> None:
        super().__init__(gamma)
        self.alpha = alpha

    def for_batch(self, everyone: PairLogps) -> AlphaDPOLoss:
        gaps = everyone.normalised_reward_gap.detach()
        gaps = gaps[torch.isfinite(gaps)]
        nothing = gaps.new_zeros(())
        return self.changed(_moments=(gaps.mean(), gaps.std()) if gaps.numel() > 1 else (nothing, nothing))

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        if self._moments is None:
            raise ValueError("AlphaDPOLoss needs the whole batch: call for_batch first")
        gap = logps.normalised_reward_gap.detach()
        mean, std = (moment.to(gap) for moment in self._moments)
        # without a spread, as while policy and reference are equal, no pair differs from the others
        z = torch.where(std > 1e-6, (gap - mean) / std.clamp(min=1e-6), 0.0)
        own = beta * self.alpha * z
        return super().per_pair(logps, beta, own if margin is None else own + margin)


class IPOLoss(PairLoss):
    """IPO, (h − 1/2β)² (arXiv 2310.12036, eq. 17), on summed log-probs as in that paper: β sets the target of h."""

    beta_floor = 0.25  # at most four times the target at β0; a hundredth would ask for 500 nats at β0 = 0.1
    has_swapped_form = True

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        return (self.discrepancy(logps) - 0.5 / beta).square()


class LengthNormalisedIPOLoss(IPOLoss):
    """IPO on averages per token, (h̄ − 1/2β)², TRL's `ipo`; the discrepancy is h̄, of log-ratios per token."""

    def discrepancy(self, logps: PairLogps) -> Tensor:
        return logps.normalised_reward_gap


class SPPOHardLoss(PairLoss):
    """SPPO with hard labels, (r_w − 1/2β)² + (r_l + 1/2β)² of log-ratios r (arXiv 2405.00675, eq. 4.7)."""

    beta_floor = 0.25

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        (chosen, rejected), target = logps.log_ratios, 0.5 / beta
        return (chosen - target).square() + (rejected + target).square()


class KTOPairLoss(PairLoss):
    """KTO on pairs (arXiv 2402.01306, in the paired form that TRL shipped as `kto_pair`).

    The loss is ½·[1 − σ(β·(r_w − KL_l))] + ½·[1 − σ(β·(KL_w − r_l))] for log-ratios r to the reference. KL_w, KL_l
    are the means of r over the chosen and the rejected responses of the global batch, also of pairs that a filter
    drops, at least 0, without gradient.
    """

    _divergences: tuple[Tensor, Tensor] | None = None  # KL_w, KL_l

    def for_batch(self, everyone: PairLogps) -> KTOPairLoss:
        good = torch.isfinite(everyone.reward_gap)
        ratios = [ratio[good].detach() for ratio in everyone.log_ratios]
        chosen, rejected = (r.sum().div(max(r.numel(), 1)).clamp(min=0.0) for r in ratios)
        return self.changed(_divergences=(chosen, rejected))

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        if self._divergences is None:
            raise ValueError("KTOPairLoss needs the whole batch: call for_batch first")
        chosen_kl, rejected_kl = (kl.to(beta.dtype) for kl in self._divergences)  # 0-d, on any device
        chosen, rejected = logps.log_ratios
        return 0.5 * (torch.sigmoid(-beta * (chosen - rejected_kl)) + torch.sigmoid(-beta * (chosen_kl - rejected)))
