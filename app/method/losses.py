"""Preference losses on summed log-probabilities, with β as an argument: it may change by step or by pair.

A loss is a function of (log-probs, β, margin): it knows no rank, no filter and no schedule.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from app.method.logps import PairLogps
from app.method.ranges import FiniteFloat, NonNegativeFloat, PositiveFloat, ShareBelowHalf, checked


class PairLoss(ABC):
    """A loss per pair, from the log-probs of B pairs, β and, where the loss has a place for it, a margin.

    `needs_reference` tells whether the loss reads the reference's log-probs, `takes_margin` whether it has a
    logit β·h that a margin can be subtracted from. `beta_floor` is the default smallest β of a schedule, as a
    multiple of β0. Results keep the dtype of the log-probs and stay finite in
    float32 for |β·h| up to 1e6 (up to 1e18 where the loss is a square).
    """

    needs_reference: bool = True
    takes_margin: bool = False
    beta_floor: float = 0.01

    def discrepancy(self, logps: PairLogps) -> Tensor:
        """[B] what β acts on, and what the running statistics, the filter and dynamic β therefore look at."""
        return logps.reward_gap

    @property
    def needs_batch(self) -> bool:
        """Whether `for_batch` makes a difference: no pair's loss is known before all pairs are scored."""
        return type(self).for_batch is not PairLoss.for_batch

    def for_batch(self, everyone: PairLogps) -> PairLoss:
        """This loss for one optimizer step, given the log-probs of all G pairs of the global batch.

        A loss with a term over the whole batch returns a copy that holds it, so that results do not depend on
        how ranks and micro-batches share the pairs. Pairs without a finite gap count for nothing.
        """
        return self

    def __call__(self, logps: PairLogps, beta: Tensor, margin: Tensor | None = None) -> Tensor:
        """Loss of every pair [B] in nats for `beta` and `margin`, [B] or 0-d; no gradient flows into either.

        Raises ValueError for a margin that the loss has no place for.
        """
        if margin is not None and not self.takes_margin:
            raise ValueError(f"{self} has no logit β·h to subtract a margin from")
        # β arrives as float64 from the CPU; a float32 loss must not turn into a float64 one because of it.
        like = logps.policy_chosen
        return self.per_pair(logps, beta.detach().to(like), None if margin is None else margin.detach().to(like))

    def __str__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        """[B], with β and margin as constants of the right dtype; the margin is None unless `takes_margin`."""


class LogitLoss(PairLoss):
    """A loss of the logit β·gap − margin: the family that a margin per pair has a meaning for."""

    takes_margin = True

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        logits = beta * self.discrepancy(logps)
        return self.of_logits(logits if margin is None else logits - margin)

    @abstractmethod
    def of_logits(self, logits: Tensor) -> Tensor:
        """Loss [B] of the logits [B]."""


@checked
class SigmoidLoss(LogitLoss):
    """DPO, −log σ(β·h) (arXiv 2305.18290, eq. 7); conservative DPO (cDPO) for `label_smoothing` ε > 0.

    cDPO is (1 − ε)·−log σ(β·h) + ε·−log σ(−β·h): a label is taken to be swapped with probability ε.
    Raises ValueError unless 0 ≤ ε < 0.5.
    """

    def __init__(self, label_smoothing: ShareBelowHalf = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def of_logits(self, logits: Tensor) -> Tensor:
        upright, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        return (1.0 - self.label_smoothing) * upright + self.label_smoothing * swapped


@checked
class RobustLoss(LogitLoss):
    """Robust DPO (arXiv 2403.00409): an unbiased estimate of the DPO loss under labels swapped with rate ε.

    ((1 − ε)·−log σ(β·h) − ε·−log σ(−β·h)) / (1 − 2ε). It can be negative, and it has no lower bound.
    Raises ValueError unless 0 ≤ ε < 0.5.
    """

    def __init__(self, label_smoothing: ShareBelowHalf = 0.1) -> None:
        self.label_smoothing = label_smoothing

    def of_logits(self, logits: Tensor) -> Tensor:
        upright, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        weighted = (1.0 - self.label_smoothing) * upright - self.label_smoothing * swapped
        return weighted / (1.0 - 2.0 * self.label_smoothing)


class HingeLoss(LogitLoss):
    """max(0, 1 − β·h), the hinge of SLiC (arXiv 2305.10425) on DPO's logits."""

    def of_logits(self, logits: Tensor) -> Tensor:
        return F.relu(1.0 - logits)


@checked
class SimPOLoss(LogitLoss):
    """SimPO, −log σ(β·(l_w/|y_w| − l_l/|y_l|) − γ) (arXiv 2405.14734, eq. 6); needs no reference.

    A dynamic β scales the length-normalised gap and leaves the margin γ = `gamma` as it is. The β-DPO paper
    does not say which; tying γ to β would move the target margin with every batch.
    Raises ValueError unless γ is finite and not negative.
    """

    needs_reference = False

    def __init__(self, gamma: NonNegativeFloat = 1.0) -> None:
        self.gamma = gamma

    def discrepancy(self, logps: PairLogps) -> Tensor:
        return logps.normalised_gap

    def of_logits(self, logits: Tensor) -> Tensor:
        return -F.logsigmoid(logits - self.gamma)


@checked
class AlphaDPOLoss(SimPOLoss):
    """α-DPO as its authors' code has it: −log σ(β·(l_w/|y_w| − l_l/|y_l|) − γ − β·α·z) (arXiv 2410.10148).

    z standardises the gap *with* reference, per token, over the global batch (sample standard deviation), without
    gradient; the logit itself has no reference. Their code averages mean and deviation over steps from a start at
    zero; here they are the batch's own. Their settings for Llama-3-8B-Instruct: β 2.5, γ/β 0.6, α 0.2.
    Raises ValueError unless α is finite, or unless `for_batch` came first.
    """

    needs_reference = True
    needs_batch = True
    _moments: tuple[Tensor, Tensor] | None = None  # mean and deviation of the batch

    def __init__(self, alpha: FiniteFloat = 0.2, gamma: NonNegativeFloat = 1.5) -> None:
        super().__init__(gamma)
        self.alpha = alpha

    def for_batch(self, everyone: PairLogps) -> AlphaDPOLoss:
        gaps = everyone.normalised_reward_gap.detach()
        gaps = gaps[torch.isfinite(gaps)]
        bound = copy.copy(self)
        bound._moments = (gaps.mean(), gaps.std()) if gaps.numel() > 1 else (gaps.new_zeros(()), gaps.new_zeros(()))
        return bound

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        if self._moments is None:
            raise ValueError("AlphaDPOLoss needs the whole batch: call for_batch first")
        gap = logps.normalised_reward_gap.detach()
        mean, std = (moment.to(gap) for moment in self._moments)
        # no spread to measure by, as when policy and reference are still equal: no pair stands out
        z = torch.where(std > 1e-6, (gap - mean) / std.clamp(min=1e-6), 0.0)
        own = beta * self.alpha * z
        return super().per_pair(logps, beta, own if margin is None else own + margin)


class IPOLoss(PairLoss):
    """IPO, (h − 1/2β)² (arXiv 2310.12036, eq. 17), on summed log-probs as in that paper.

    β sets the target of the gap: a larger β asks for a smaller gap. The floor of β is a quarter of β0, so that the
    target stays within four times that of β0; a hundredth would ask for 500 nats at β0 = 0.1.
    """

    beta_floor = 0.25

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        return (self.discrepancy(logps) - 0.5 / beta).square()


class LengthNormalisedIPOLoss(IPOLoss):
    """IPO on averages per token, (h̄ − 1/2β)²: the form that TRL ships as its `ipo` loss.

    h̄ is the log-ratio per token of the chosen minus that of the rejected response. It is also the
    discrepancy: the statistics watch the quantity that the target 1/2β is set for.
    """

    def discrepancy(self, logps: PairLogps) -> Tensor:
        return logps.normalised_reward_gap


class SPPOHardLoss(PairLoss):
    """SPPO with hard labels, (r_w − 1/2β)² + (r_l + 1/2β)² (arXiv 2405.00675, eq. 4.7 with P = 1 and 0).

    r is a response's log-ratio to the reference. As in IPO, β sets targets, here one for each response.
    """

    beta_floor = 0.25

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        target = 0.5 / beta
        return (logps.chosen_log_ratio - target).square() + (logps.rejected_log_ratio + target).square()


class KTOPairLoss(PairLoss):
    """KTO on pairs (arXiv 2402.01306, in the paired form that TRL shipped as `kto_pair`).

    ½·[1 − σ(β·(r_w − KL_l))] + ½·[1 − σ(β·(KL_w − r_l))], r being log-ratios to the reference and KL_w, KL_l
    the means of r over the chosen and the rejected responses of the global batch, at least 0, without
    gradient. All pairs of the batch count in them, those that a filter drops too: they estimate how far the
    policy stands from the reference, not what is trained on. Raises ValueError unless `for_batch` came first.
    """

    _divergences: tuple[Tensor, Tensor] | None = None  # KL_w, KL_l

    def for_batch(self, everyone: PairLogps) -> KTOPairLoss:
        good = torch.isfinite(everyone.reward_gap)
        ratios = (everyone.chosen_log_ratio[good], everyone.rejected_log_ratio[good])
        chosen, rejected = (r.detach().sum().div(max(r.numel(), 1)).clamp(min=0.0) for r in ratios)
        bound = copy.copy(self)
        bound._divergences = (chosen, rejected)
        return bound

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        if self._divergences is None:
            raise ValueError("KTOPairLoss needs the whole batch: call for_batch first")
        chosen_kl, rejected_kl = (kl.to(beta.dtype) for kl in self._divergences)  # 0-d, on any device
        chosen = torch.sigmoid(-beta * (logps.chosen_log_ratio - rejected_kl))
        rejected = torch.sigmoid(-beta * (chosen_kl - logps.rejected_log_ratio))
        return 0.5 * (chosen + rejected)


@checked
class WithSFTTerm(PairLoss):
    """`loss` + w·−log π(y_w|x)/|y_w|: the likelihood of the chosen response beside any preference loss.

    The term of RPO (arXiv 2404.19733; `rpo_alpha` in TRL, which averages over the tokens of the batch and not
    within each response). β does not touch it. Raises ValueError unless the weight w = `sft_weight` is finite
    and positive.
    """

    def __init__(self, loss: PairLoss, sft_weight: PositiveFloat) -> None:
        self.loss = loss
        self.sft_weight = sft_weight
        self.needs_reference = loss.needs_reference
        self.takes_margin = loss.takes_margin
        self.beta_floor = loss.beta_floor

    def __str__(self) -> str:
        return str(self.loss)

    def discrepancy(self, logps: PairLogps) -> Tensor:
        return self.loss.discrepancy(logps)

    @property
    def needs_batch(self) -> bool:
        return self.loss.needs_batch

    def for_batch(self, everyone: PairLogps) -> WithSFTTerm:
        return WithSFTTerm(self.loss.for_batch(everyone), self.sft_weight)

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        likelihood = logps.policy_chosen / logps.chosen_tokens
        return self.loss.per_pair(logps, beta, margin) - self.sft_weight * likelihood
