"""The record of one optimizer step, which statistics, filters and β schedules change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.method.dynamic_beta import MINIMUM_STD, Moments
from app.method.pair_loss import PairLogps, PairLoss


@dataclass
class StepDecision:
    """The measurements and decisions for the G pairs of a global batch, on the CPU, outside any graph.

    It starts as plain DPO: every eligible pair is kept and β = β0. Callbacks change all but the measured fields by
    `on_reward_gaps(trainer, pl_module, decision)`, in the order of `callbacks.SLOTS`, or only read it, before the
    weights change, by `on_step_decided`, which requires no measuring pass. Every rank makes the same changes.
    """

    step: int  # the number of this optimizer step, from 1
    pair_ids: Sequence[str]  # [G], the global batch in its canonical order
    logps: PairLogps  # [G] float64
    loss: PairLoss  # of this batch (`PairLoss.for_batch`)
    beta0: float  # base β
    labels: Mapping[str, Sequence[object]] = field(default_factory=dict)  # each [G], columns of the data
    minimum_std: float = MINIMUM_STD  # the σ of M that rounding can explain; rescale it with the discrepancy
    gaps: Tensor = field(init=False)  # [G] float64, the loss's discrepancy as measured (h for DPO)
    reference_margin: Tensor | None = field(init=False)  # [G] float64 (`PairLogps.reference_margin`)
    discrepancy: Tensor = field(init=False)  # [G] float64, M: what statistics, filter and β use; starts as the gaps
    eligible: Tensor = field(init=False)  # [G] bool; pairs with a finite gap: the others are not kept nor counted
    kept: Tensor = field(init=False)  # [G] bool, K: the pairs trained on; starts as the eligible ones
    beta: Tensor = field(init=False)  # [G] float64, starts as β0 everywhere
    loss_weight: Tensor = field(init=False)  # [G] float64, factor on each pair's loss; starts as 1
    margin: Tensor | None = None  # [G] float64, subtracted from the logits β·h; for losses that take one
    # [G] float64, the probability that each label is right; for losses with a swapped form (RE-PO)
    confidence: Tensor | None = None
    moments: Moments | None = None  # M0 and σ, updated with this batch
    log_weights: Tensor | None = None  # [G] float64, unnormalised log weights of the selection
    # Two functions that every rank must call; they give NaN for pairs that are not eligible. The first measures
    # log π(y_w|x) − log π(y_l|x) under logits (1+ε)·logits_θ − ε·logits_ref for each ε given, [len(ε), G].
    measure_perturbed: Callable[[Sequence[float]], Tensor] | None = None
    # KL(π‖π_ref) summed over the tokens of the chosen and of the rejected response, [2, G] float64; None if no
    # reference model is loaded
    measure_kl: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        self._measured = self.loss.gaps(self.logps).detach().to("cpu", torch.float64)
        for name, column in {"pair_ids": self.pair_ids, **self.labels}.items():
            if len(column) != self._measured.numel():
                raise ValueError(f"{name} has {len(column)} entries for {self._measured.numel()} gaps")
        self.gaps, self.discrepancy = self._measured.clone(), self._measured.clone()
        self.reference_margin = self.logps.reference_margin
        self.eligible = torch.isfinite(self.gaps)
        self.kept = self.eligible.clone()
        self.beta = torch.full_like(self.gaps, self.beta0)
        self.loss_weight = torch.ones_like(self.gaps)

    @property
    def kept_count(self) -> int:
        return int(self.kept.sum())

    @property
    def kept_fraction(self) -> float:
        """Return k/G, where G counts ineligible pairs too; 0 for an empty batch."""
        return self.kept_count / max(self.kept.numel(), 1)

    @property
    def kept_discrepancy(self) -> Tensor:
        """Return M of the kept pairs, [k] float64."""
        return self.discrepancy[self.kept]

    @property
    def beta_used(self) -> float:
        """Return the mean β of the kept pairs; β0 when none is kept."""
        return float(self.beta[self.kept].mean()) if self.kept_count else self.beta0

    @property
    def _term_names(self) -> list[str]:
        return ["loss_weight", "beta", *(n for n in ("margin", "confidence") if getattr(self, n) is not None)]

    def terms(self, positions: Tensor) -> Tensor:
        """Return weight, β and, if any, margin and confidence of pairs, by positions or a mask [B]: [2 to 4, B]."""
        return torch.stack([getattr(self, name) for name in self._term_names])[:, positions]

    def weighted_losses(self, logps: PairLogps, terms: Tensor) -> Tensor:
        """Return the weighted loss [B] of the pairs `logps` [B] under their `terms` [2 to 4, B]."""
        weight, *others = terms.to(logps.policy_chosen)
        return self.loss(logps, **dict(zip(self._term_names[1:], others, strict=True))) * weight

    def pair_losses(self) -> Tensor:
        """Return every pair's loss under the decisions so far, without weights: [G] float64, NaN if ineligible."""
        losses = self.loss(self.logps, self.beta, self.margin, self.confidence)
        return losses.masked_fill(~self.eligible, math.nan)

    def label_logits(self) -> Tensor:
        """Return log p/(1 − p) of every label under the loss (`PairLoss.label_logit`), [G] float64."""
        return self.loss.label_logit(self.logps, self.beta, self.margin).masked_fill(~self.eligible, math.nan)

    def fault(self) -> str:
        """Return why the step cannot be trained as decided, as a clause; an empty text if it can."""
        for name in ("gaps", "kept", *self._term_names):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.shape != self._measured.shape:
                return f"decision.{name} must be a tensor with an entry for each of the {len(self.pair_ids)} pairs"
        if not torch.allclose(self.gaps.double(), self._measured, rtol=0.0, atol=0.0, equal_nan=True):
            return "decision.gaps are the measured ones and must stay: change decision.discrepancy"
        if self.kept.dtype != torch.bool or not self.kept.any() or (self.kept & ~self.eligible).any():
            return "decision.kept must be bool, true for at least one pair, and for none without a finite gap"
        for name in self._term_names:
            if not getattr(self, name)[self.kept].isfinite().all():
                return f"decision.{name} is not finite for a kept pair"
        return "" if (self.beta[self.kept] > 0).all() else "decision.beta is not above 0 for a kept pair"
