"""The preference optimisation stage, with the two-phase step of β-DPO."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from app.core.errors import StepRefused, UserError
from app.method.batch import OptimizerBatch, PackedRows, on_device
from app.method.dynamic_beta import MINIMUM_STD, rounding_std
from app.method.losses import SigmoidLoss
from app.method.pair_loss import PairLogps, PairLoss, pair_metrics
from app.method.ranges import NonNegativeFloat, PositiveFloat, ShareBelowOne, checked
from app.method.step import StepDecision
from lightning_modules.measuring import peak_operations, perturbed_gaps, reference_kl, step_operations
from lightning_modules.preference_scoring import PreferenceScoring, ReferenceKind
from lightning_modules.scorer import response_logps
from lightning_modules.sharding import keeps_gradients

log = logging.getLogger(__name__)

IN_THE_BAR = ("train/loss", "beta/used", "filter/kept_fraction", "train/reward_accuracy", "train/pairs_per_second")
SCALED_BY_BETA = ("reward_margin", "reward_chosen", "reward_rejected")


@checked
class PreferenceOptimization(PreferenceScoring):
    """The stage for DPO and its variants; with `RewardGapStatistics`, `PairFilter` and `BetaScheduler` it is β-DPO.

    One step (method §1): measure the reward gap of every pair of the global batch; let the callbacks with a method
    `on_reward_gaps` choose β and the pairs to keep; back-propagate the loss of the kept pairs; update.

    Args:
        name: folder or Hub id of the SFT model, which is the start of the policy and the reference.
        reference_name: folder or Hub id of another model for the reference, with the same tokens.
        beta0: β0, the base β; evaluation always uses it.
        loss: per-pair loss of the log-probabilities and β.
        reference: `frozen` keeps the reference as a second model or, with `lora` and without `reference_name`,
            uses the policy without its adapters; `cached` scores every pair once before training and keeps the
            log-probabilities on disk for all runs from the same model.
        sft_weight: weight of the term −log π(y_w|x)/|y_w| added to the loss.
        max_nonfinite_share: the run stops at a step in which more than this share of pairs has no finite gap;
            up to this share, such pairs are left out, counted and named in the log.

    The other arguments are those of `LanguageModelTraining`.
    """

    def __init__(
        self,
        name: str,
        beta0: PositiveFloat = 0.1,
        loss: PairLoss | None = None,
        reference: ReferenceKind = "frozen",
        reference_name: str | None = None,
        sft_weight: NonNegativeFloat = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-7, weight_decay=0.0),
        max_grad_norm: PositiveFloat | None = 10.0,
        max_nonfinite_share: ShareBelowOne = 0.1,
        **settings: Any,
    ):
        super().__init__(name=name, architecture=None, optimizer=optimizer, max_grad_norm=max_grad_norm, **settings)
        self.beta0 = beta0
        loss = SigmoidLoss() if loss is None else loss
        if reference_name is not None and not loss.needs_reference:
            raise UserError(f"model.reference_name has no effect with {loss}, which needs none: take it out.")
        self.loss = loss.with_sft(sft_weight)
        self.reference: ReferenceKind = reference
        self.reference_name = reference_name
        self.max_nonfinite_share = max_nonfinite_share
        self.nonfinite_pairs = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["nonfinite_pairs"] = self.nonfinite_pairs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.nonfinite_pairs = checkpoint.get("nonfinite_pairs", 0)  # an SFT checkpoint has none

    # --- the step ---------------------------------------------------------------------------------------

    def training_step(self, batch: OptimizerBatch, batch_idx: int) -> Tensor:
        micro_batches = self.micro_batches(batch)
        global_logps = None
        if len(micro_batches) > 1 and not self.needs_gaps_first:
            global_logps = self.backward_all(batch, micro_batches)
        if global_logps is not None:
            decision = self.decide(global_logps, batch)
        else:
            # A single micro-batch keeps its graph for the backward pass; several would need too much memory.
            self.policy.some_dropped = len(micro_batches) == 1
            with torch.set_grad_enabled(len(micro_batches) == 1):
                logps, global_logps = self.measurer.measure(batch, micro_batches)
            decision = self.decide(global_logps, batch)
            self.backward_kept(batch, logps, decision)
        for hook in self.hooks("on_step_decided"):
            hook(self.trainer, self, decision)
        return self.log_step(decision, batch, self.update())

    @property
    def needs_gaps_first(self) -> bool:
        """Return whether all gaps are needed before a backward pass, or gradients could not be dropped."""
        depends = self.loss.needs_batch or bool(self.hooks("on_reward_gaps"))
        return depends or keeps_gradients(self.trainer.strategy)

    def hooks(self, name: str) -> list[Any]:
        """Return the methods `name` of the callbacks that have one, in the Trainer's order (see `StepDecision`)."""
        return [getattr(one, name) for one in self.trainer.callbacks if hasattr(one, name)]  # type: ignore[attr-defined]

    def backward_all(self, batch: OptimizerBatch, micro_batches: Sequence[PackedRows]) -> PairLogps | None:
        """Back-propagate the loss at β0 of every pair as it is scored, and return the result of `gather`.

        If a pair is not finite, drop the gradients and return None: the gaps have to be known first. This is
        checked before the last backward pass, in which DDP exchanges the gradients.
        """
        parts: list[PairLogps] = []
        for number, rows in enumerate(micro_batches, 1):
            part = self.measurer.measure_rows(batch, [rows]).select(rows.pairs)
            losses = self.loss(part, torch.full_like(part.policy_chosen, self.beta0))
            if number < len(micro_batches):
                self.backward_share(losses, len(batch.pair_ids), last=False)
            parts.append(part.detach())
        order = torch.cat([rows.pairs for rows in micro_batches]).argsort()
        global_logps = self.measurer.gather(PairLogps.cat(parts).select(order), batch)
        if not global_logps.finite.all():
            self.policy.zero_grad()
            return None
        self.backward_share(losses, len(batch.pair_ids), last=True)
        return global_logps

    def backward_kept(self, batch: OptimizerBatch, logps: PairLogps, decision: StepDecision) -> None:
        """Back-propagate (1/|K|) Σ_{i∈K} loss_i of the kept pairs K, through the graph of `logps` if it has one."""
        here = torch.nonzero(decision.kept[batch.positions]).flatten()  # indices into this rank's share
        terms = on_device(decision.terms(batch.positions), self.device)
        if logps.policy_chosen.requires_grad and decision.eligible.all():
            pairs = on_device(here, self.device)
            losses = decision.weighted_losses(logps.select(pairs), terms[:, pairs])
            self.backward_share(losses, decision.kept_count, last=True)
            return
        # packed again without the dropped pairs, so that they cost no backward pass and their NaN cannot enter it
        kept = self.micro_batches(batch, here.tolist())
        for number, rows in enumerate(kept, 1):
            policy = response_logps(self.policy, [rows], len(batch.positions), 2, self.device)
            scored = replace(logps, policy_chosen=policy[:, 0], policy_rejected=policy[:, 1])
            losses = decision.weighted_losses(scored.select(rows.pairs), terms[:, rows.pairs])
            self.backward_share(losses, decision.kept_count, number == len(kept))

    def decide(self, global_logps: PairLogps, batch: OptimizerBatch) -> StepDecision:
        """Return the decision of the step: plain DPO, changed by the callbacks."""
        decision = StepDecision(
            step=self.trainer.global_step + 1,
            pair_ids=batch.pair_ids,
            logps=global_logps,
            loss=self.loss.bound(global_logps),
            beta0=self.beta0,
            labels=batch.labels,
            minimum_std=self.minimum_std(global_logps),
        )
        decision.measure_perturbed = partial(perturbed_gaps, self.measurer, batch, decision.eligible)
        if self.measurer.reference is not None:  # a cached reference has no distributions to compare
            decision.measure_kl = partial(reference_kl, self.measurer, batch, decision.eligible)
        self.report_nonfinite(decision)
        for hook in self.hooks("on_reward_gaps"):
            hook(self.trainer, self, decision)
            if fault := decision.fault():
                raise UserError(f"{type(hook.__self__).__name__}, step {decision.step}: {fault}.")
        return decision

    def minimum_std(self, global_logps: PairLogps) -> float:
        """Return the σ that rounding of h explains, in the units of the loss's discrepancy."""
        rounding = rounding_std(self.compute_dtype)
        rounded = replace(global_logps, policy_chosen=global_logps.policy_chosen + rounding)
        change = self.loss.discrepancy(rounded) - self.loss.discrepancy(global_logps)
        return max(float(change[torch.isfinite(change)].abs().mean().nan_to_num()), MINIMUM_STD)

    def report_nonfinite(self, decision: StepDecision) -> None:
        """Log and count the pairs without a finite gap; raise StepRefused if there are too many."""
        bad = [id for id, good in zip(decision.pair_ids, decision.eligible.tolist(), strict=True) if not good]
        if not bad:
            return
        named = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
        if len(bad) > self.max_nonfinite_share * len(decision.pair_ids):
            cure = "lower the learning rate, use trainer.precision 32-true, or raise model.max_nonfinite_share"
            counts = f"{len(bad)} of {len(decision.pair_ids)} pairs"
            raise StepRefused(f"{counts} have no finite reward gap at step {decision.step} ({named}): {cure}.")
        self.nonfinite_pairs += len(bad)
        log.warning("step %d: no finite reward gap, left out: %s", decision.step, named)

    # --- what is reported -------------------------------------------------------------------------------

    def log_step(self, decision: StepDecision, batch: OptimizerBatch, grad_norm: float) -> Tensor:
        """Log the step of the global batch, on the CPU, with rewards at β0 and at the β used; return the loss."""
        pairs = torch.nonzero(decision.eligible).flatten()
        seen = decision.logps.select(pairs)
        at_base = pair_metrics(seen, self.loss, torch.full_like(decision.beta, self.beta0)[pairs])
        at_used = pair_metrics(seen, self.loss, decision.beta[pairs])
        kept = torch.nonzero(decision.kept).flatten()
        loss = decision.weighted_losses(decision.logps.select(kept), decision.terms(kept)).mean()
        responses = int(decision.logps.chosen_tokens.sum() + decision.logps.rejected_tokens.sum())
        reference = None if self.measurer.reference is None else self.measurer.reference.model
        operations = step_operations(self.policy.model, reference, batch.tokens, responses, decision.kept_fraction)
        seconds = self.step_seconds()
        rate = operations / seconds / self.trainer.world_size  # per device
        peak = peak_operations(self.device, self.compute_dtype)
        figures: dict[str, Tensor | float] = {
            "train/loss": loss,
            "beta/used": decision.beta_used,
            "filter/kept_fraction": decision.kept_fraction,
            "train/pairs_per_second": len(decision.pair_ids) / seconds,
            **{f"train/{name}": values.mean() for name, values in at_base.items()},
            **{f"train/{name}_at_beta_used": at_used[name].mean() for name in SCALED_BY_BETA},
            "beta/base": self.beta0,
            "gap/mean": decision.gaps[decision.eligible].mean(),
            "gap/kept_mean": decision.gaps[decision.kept].mean(),
            "train/grad_norm": grad_norm,
            "train/tokens_per_second": batch.tokens / seconds,
            "train/nonfinite_pairs": float(self.nonfinite_pairs),
            "train/tera_operations_per_second": rate / 1e12,
            **({} if peak is None else {"train/mfu": rate / peak}),
        }
        for name, figure in figures.items():
            self.log(name, figure, prog_bar=name in IN_THE_BAR)
        return loss
