"""Log-probabilities of pairs, and the base of the losses, which know no rank, filter or schedule."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PairLogps:
    """The log-probabilities of B pairs, in nats, summed over response tokens (end-of-turn included, no prompt)."""

    policy_chosen: Tensor  # [B] log π(y_w|x)
    policy_rejected: Tensor  # [B] log π(y_l|x)
    reference_chosen: Tensor | None  # [B] log π_ref(y_w|x); None without a reference
    reference_rejected: Tensor | None  # [B] log π_ref(y_l|x)
    chosen_tokens: Tensor  # [B] int, |y_w|
    rejected_tokens: Tensor  # [B] int, |y_l|

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Return log π − log π_ref of chosen and rejected responses, [B] each; ValueError without a reference."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this quantity needs the reference's log-probabilities, and there are none")
        return self.policy_chosen - self.reference_chosen, self.policy_rejected - self.reference_rejected

    @property
    def reward_gap(self) -> Tensor:
        """Return h [B], the chosen minus the rejected log-ratio."""
        chosen, rejected = self.log_ratios
        return chosen - rejected

    @property
    def normalised_reward_gap(self) -> Tensor:
        """Return h [B] with each log-ratio divided by its token count."""
        chosen, rejected = self.log_ratios
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens

    @property
    def reference_margin(self) -> Tensor | None:
        """Return log π_ref(y_w|x)/|y_w| − log π_ref(y_l|x)/|y_l| [B], nats per token; None without a reference."""
        if self.reference_chosen is None or self.reference_rejected is None:
            return None
        return self.reference_chosen / self.chosen_tokens - self.reference_rejected / self.rejected_tokens

    @property
    def finite(self) -> Tensor:
        """Return [B] bool: whether all log-probabilities of a pair are finite."""
        return torch.stack([torch.isfinite(column) for column in vars(self).values() if column is not None]).all(0)

    @property
    def normalised_gap(self) -> Tensor:
        """Return log π(y_w|x)/|y_w| − log π(y_l|x)/|y_l| [B], nats per token; needs no reference."""
        return self.policy_chosen / self.chosen_tokens - self.policy_rejected / self.rejected_tokens

    def swapped(self) -> PairLogps:
        """Return the same pairs with the rejected response in the place of the chosen one."""
        policy, tokens = (self.policy_rejected, self.policy_chosen), (self.rejected_tokens, self.chosen_tokens)
        return PairLogps(*policy, self.reference_rejected, self.reference_chosen, *tokens)

    def select(self, index: Tensor) -> PairLogps:
        """Return the pairs at `index`: int64 positions or a bool mask [B]."""
        return self.each(lambda column: column[index])

    def detach(self) -> PairLogps:
        """Return the same values without a graph."""
        return self.each(Tensor.detach)

    def each(self, change: Callable[..., Tensor], *others: PairLogps) -> PairLogps:
        """Return `change` of each column and of those of `others`; a column that is None here stays None."""
        columns = zip(*(vars(one).values() for one in (self, *others)), strict=True)
        changed: Any = (None if own is None else change(own, *more) for own, *more in columns)
        return PairLogps(*changed)

    @staticmethod
    def cat(parts: Sequence[PairLogps]) -> PairLogps:
        """Return all pairs of `parts`, which all have a reference or all have none, in order."""
        return parts[0].each(lambda *columns: torch.cat(columns), *parts[1:])


def token_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Return KL(π‖π_ref) of the next-token distributions given by two sets of logits [N, V]: [N], in nats."""
    ours, fixed = (torch.log_softmax(part, dim=-1) for part in (logits, reference_logits))
    return F.kl_div(fixed, ours, reduction="none", log_target=True).sum(dim=-1)  # torch's order: the policy second


class PairLoss(ABC):
    """A loss per pair, computed from the log-probs of B pairs, β and, if the loss supports one, a margin.

    Results keep the dtype of the log-probs and stay finite in float32 for |β·h| up to 1e6 (1e18 for a square).
    """

    needs_reference: bool = True  # whether the loss reads the reference's log-probs
    takes_margin: bool = False  # whether it has a logit β·h from which a margin can be subtracted
    # whether the loss of the pair with its responses exchanged is that of the opposite label, which RE-PO needs
    has_swapped_form: bool = False
    beta_floor: float = 0.01  # default smallest β of a schedule, as a multiple of β0
    __sft_weight: float = 0.0  # a private name, because a loss of one's own may have a `sft_weight`

    def changed(self, **attributes: Any) -> Self:
        """Return a copy of the loss with other `attributes`."""
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def with_sft(self, weight: float) -> Self:
        """Return a copy with RPO's term w·−log π(y_w|x)/|y_w|, which neither β nor a confidence affects."""
        # arXiv 2404.19733; `rpo_alpha` in TRL, which averages over the tokens of the batch
        return self.changed(_PairLoss__sft_weight=weight)

    def discrepancy(self, logps: PairLogps) -> Tensor:
        """Return the quantity [B] that β multiplies; running statistics, filter and dynamic β use the same one."""
        return logps.reward_gap

    def gaps(self, logps: PairLogps) -> Tensor:
        """Return the discrepancy [B], NaN for pairs of which any log-probability is not finite."""
        return self.discrepancy(logps).where(logps.finite, torch.nan)

    @property
    def needs_batch(self) -> bool:
        """Return whether all pairs of the batch must be scored before the loss of one is known."""
        return type(self).for_batch is not PairLoss.for_batch

    def for_batch(self, everyone: PairLogps) -> PairLoss:
        """Return the loss for one optimizer step, given the log-probs of all G pairs of the global batch.

        A loss with a term over the whole batch returns itself `changed` to hold it, so that ranks and micro-batches
        make no difference. Pairs without a finite gap do not count.
        """
        return self

    def bound(self, everyone: PairLogps) -> PairLoss:
        """Return the loss of `for_batch` with the SFT term, which a loss that builds a new one need not know."""
        return self.for_batch(everyone).with_sft(self.__sft_weight)

    def __call__(
        self, logps: PairLogps, beta: Tensor, margin: Tensor | None = None, confidence: Tensor | None = None
    ) -> Tensor:
        """Return the loss of every pair [B] for `beta`, `margin` and `confidence`, each [B] or 0-d, detached."""
        if margin is not None and not self.takes_margin:
            raise ValueError(f"{self} has no logit β·h to subtract a margin from")
        if confidence is not None and not self.has_swapped_form:
            raise ValueError(f"{self} has no swapped form, which a confidence in the label needs")
        like = logps.policy_chosen  # β comes in float64 from the CPU and must not change the dtype of the loss
        beta, margin = beta.detach().to(like), None if margin is None else margin.detach().to(like)
        likelihood = logps.policy_chosen / logps.chosen_tokens if self.__sft_weight else None
        if confidence is None:
            losses = self.per_pair(logps, beta, margin)
        else:
            losses = self.under_doubt(logps, beta, margin, confidence.detach().to(like))
        if losses.shape != like.shape:  # a mean would count a micro-batch as one pair
            raise ValueError(f"{self} returns a loss of shape {[*losses.shape]}, not one per pair {[*like.shape]}")
        return losses if likelihood is None else losses - self.__sft_weight * likelihood

    def label_logit(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        """Return log p/(1 − p) [B], where p = σ(L(swapped) − L(as labelled)) is the probability of the label."""
        return self.per_pair(logps.swapped(), beta, margin) - self.per_pair(logps, beta, margin)

    def under_doubt(self, logps: PairLogps, beta: Tensor, margin: Tensor | None, confidence: Tensor) -> Tensor:
        """Return RE-PO's loss [B], −[w·log p + (1 − w)·log(1 − p)], for a `confidence` w [B] (arXiv 2509.24159)."""
        logit = self.label_logit(logps, beta, margin)
        return -(confidence * F.logsigmoid(logit) + (1.0 - confidence) * F.logsigmoid(-logit))

    def __str__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        """Return the loss [B]. β and margin have the log-probs' dtype; margin is None unless `takes_margin`."""


class LogitLoss(PairLoss):
    """A loss of the logit β·gap − margin: the family of losses for which a margin per pair is defined."""

    takes_margin = True

    def per_pair(self, logps: PairLogps, beta: Tensor, margin: Tensor | None) -> Tensor:
        logits = beta * self.discrepancy(logps)
        return self.of_logits(logits if margin is None else logits - margin)

    @abstractmethod
    def of_logits(self, logits: Tensor) -> Tensor:
        """Return the loss [B] of the logits [B]."""


def pair_metrics(logps: PairLogps, loss: PairLoss, beta: Tensor) -> dict[str, Tensor]:
    """Return per-pair metrics [B] under β [B]: rewards, their margin and accuracy, log-probabilities.

    The implicit reward is β·(log π − log π_ref) (DPO eq. 6); without a reference, β·log π/|y| (SimPO eq. 4).
    """
    ranked: dict[str, Tensor] = {}
    if loss.needs_reference:
        chosen, rejected = logps.log_ratios
        assert logps.reference_chosen is not None
        assert logps.reference_rejected is not None
        ranked["reference_accuracy"] = _ranked_right(logps.reference_chosen, logps.reference_rejected)
        ranked["log_ratio_chosen"], ranked["log_ratio_rejected"] = chosen, rejected  # displacement, in nats
    else:
        chosen = logps.policy_chosen / logps.chosen_tokens
        rejected = logps.policy_rejected / logps.rejected_tokens
    beta = beta.to(chosen)
    return {
        "reward_accuracy": _ranked_right(chosen, rejected),
        "reward_margin": beta * (chosen - rejected),
        "reward_chosen": beta * chosen,
        "reward_rejected": beta * rejected,
        "logp_chosen": logps.policy_chosen,
        "logp_rejected": logps.policy_rejected,
        "policy_accuracy": _ranked_right(logps.policy_chosen, logps.policy_rejected),
        **ranked,
    }


def _ranked_right(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 where `chosen` is larger, ½ for a tie (so an untrained policy scores ½), else 0; NaN of NaN."""
    difference = chosen - rejected
    return ((1 + torch.sign(difference)) / 2).where(~difference.isnan(), torch.nan)  # torch's sign(NaN) is 0
