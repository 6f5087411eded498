"""The record of one optimizer step, and the hook by which statistics, filters and β schedules write in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from app.method.logps import PairLogps
from app.method.losses import PairLoss
from app.method.moments import MINIMUM_STD, Moments


class MissingStatistics(LookupError):
    """A filter or β schedule met no running statistics; its text names the cure."""


@dataclass
class StepDecision:
    """What is known and decided about the G pairs of a global batch between the gaps and the loss.

    It starts as plain DPO: every eligible pair kept and β = β0. Callbacks change `discrepancy`, `moments`,
    `log_weights`, `kept`, `beta`, `loss_weight` and `margin`, in the order of trainer.callbacks; every rank does
    the same on the same numbers. All tensors lie on the CPU, outside any graph.
    """

    step: int  # optimizer steps done before this one
    pair_ids: Sequence[str]  # [G], the global batch in its canonical order
    beta0: float  # base β
    gaps: Tensor  # [G] float64, the loss's discrepancy as measured (h for DPO), raw
    discrepancy: Tensor  # [G] float64, M: what statistics, filter and β use; starts as the gaps
    eligible: Tensor  # [G] bool; a pair without a finite gap is never kept and never enters the statistics
    kept: Tensor  # [G] bool, K: the pairs trained on; starts as the eligible ones
    beta: Tensor  # [G] float64, starts as β0 everywhere
    loss_weight: Tensor  # [G] float64, what each pair's loss is multiplied by; starts as 1
    # [G] float64, nats per token, by how much the reference prefers the chosen response; None without a reference
    reference_margin: Tensor | None = None
    # σ of M that rounding explains, in the units of M: whoever changes the discrepancy changes it along
    minimum_std: float = MINIMUM_STD
    margin: Tensor | None = None  # [G] float64, subtracted from the logits β·h; for losses that take one
    moments: Moments | None = None  # M0 and σ, this batch already taken in
    log_weights: Tensor | None = None  # [G] float64, of the selection, unnormalised
    labels: Mapping[str, Sequence[object]] = field(default_factory=dict)  # each [G], columns of the data
    # Measures, on demand and on every rank at once, log π(y_w|x) − log π(y_l|x) under logits
    # (1+ε)·logits_θ − ε·logits_ref for each ε given: [len(ε), G]; NaN for pairs that are not eligible.
    measure_perturbed: Callable[[Sequence[float]], Tensor] | None = None
    # Measures, likewise, KL(π‖π_ref) summed over the tokens of the chosen and of the rejected response: [2, G]
    # float64, NaN for pairs that are not eligible. None where no reference model is at hand (or none is needed).
    measure_kl: Callable[[], Tensor] | None = None

    @classmethod
    def start(
        cls,
        step: int,
        pair_ids: Sequence[str],
        gaps: Tensor,
        beta0: float,
        labels: Mapping[str, Sequence[object]] | None = None,
    ) -> StepDecision:
        """Plain DPO on pairs with `gaps` [G]. Raises ValueError if ids, gaps and labels differ in number."""
        gaps = gaps.detach().to("cpu", torch.float64).clone()
        labels = dict(labels or {})
        for name, column in {"pair_ids": pair_ids, **labels}.items():
            if len(column) != gaps.numel():
                raise ValueError(f"{name} has {len(column)} entries for {gaps.numel()} gaps")
        eligible = torch.isfinite(gaps)
        return cls(
            step=step,
            pair_ids=pair_ids,
            beta0=beta0,
            gaps=gaps,
            discrepancy=gaps.clone(),
            eligible=eligible,
            kept=eligible.clone(),
            beta=torch.full_like(gaps, beta0),
            loss_weight=torch.ones_like(gaps),
            labels=labels,
        )

    @property
    def kept_count(self) -> int:
        """k, the number of pairs trained on."""
        return int(self.kept.sum())

    @property
    def kept_fraction(self) -> float:
        """k/G, of all pairs and not only of the eligible ones; 0 for an empty batch."""
        return self.kept_count / max(self.kept.numel(), 1)

    @property
    def kept_discrepancy(self) -> Tensor:
        """M of the kept pairs, [k] float64."""
        return self.discrepancy[self.kept]

    @property
    def beta_used(self) -> float:
        """Mean β of the kept pairs; β0 when none is kept."""
        return float(self.beta[self.kept].mean()) if self.kept_count else self.beta0

    def terms(self, positions: Tensor) -> Tensor:
        """β, weight and the margin, if any, of the pairs at `positions` [B] in the global batch: [2 or 3, B]."""
        columns = [self.beta, self.loss_weight, *([] if self.margin is None else [self.margin])]
        return torch.stack(columns)[:, positions]

    def losses(self, loss: PairLoss, logps: PairLogps, positions: Tensor) -> Tensor:
        """`loss` of the pairs `logps` [B] at `positions` [B] in the global batch, weighted: [B]."""
        return weighted_losses(loss, logps, self.terms(positions))

    def require_moments(self, who: str) -> Moments:
        """M0 and σ of this step, for the callback named `who`. Raises MissingStatistics, naming the cure."""
        if self.moments is None:
            raise MissingStatistics(
                f"{who} needs the running reward-gap statistics: "
                "put callbacks.RewardGapStatistics before it in trainer.callbacks"
            )
        return self.moments


def weighted_losses(loss: PairLoss, logps: PairLogps, terms: Tensor) -> Tensor:
    """`loss` of the pairs `logps` [B] under their `terms` [2 or 3, B] (`StepDecision.terms`), weighted: [B]."""
    beta, weight, *margin = terms.to(logps.policy_chosen)
    return loss(logps, beta, *margin) * weight


@runtime_checkable
class RewardGapHook(Protocol):
    """A callback that takes part in the step, between the gaps and the loss."""

    def on_reward_gaps(self, trainer: Any, pl_module: Any, decision: StepDecision) -> None:
        """Read and change `decision`; called once per optimizer step on every rank, in trainer order."""
        ...


@runtime_checkable
class StepObserver(Protocol):
    """A callback that only looks at what was decided: without a `RewardGapHook`, pairs need no measuring pass."""

    def on_step_decided(self, trainer: Any, pl_module: Any, decision: StepDecision) -> None:
        """Read `decision`, which is final; called before the weights change, on every rank, in trainer order."""
        ...
