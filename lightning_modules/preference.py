"""The preference optimisation stage: the two-phase step of β-DPO, its reference, and evaluation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric, Metric, SumMetric

from app.core.errors import StepRefused, UserError, renamed
from app.method.batch import OptimizerBatch, PackedRows, on_device
from app.method.dynamic_beta import BFLOAT16_STD, MINIMUM_STD
from app.method.losses import SigmoidLoss
from app.method.pair_loss import PairLogps, PairLoss, pair_metrics
from app.method.ranges import NonNegativeFloat, PositiveFloat, ShareBelowOne, checked
from app.method.step import StepDecision
from lightning_modules.base import LanguageModelTraining, warn_of_nonfinite
from lightning_modules.layout_check import CHECKED_PAIRS
from lightning_modules.measuring import (
    SIDES,
    PairMeasurer,
    peak_operations,
    perturbed_gaps,
    reference_kl,
    step_operations,
)
from lightning_modules.reference_cache import filled_reference_cache
from lightning_modules.refused_models import check_tokens
from lightning_modules.scorer import ResponseScorer, response_logps
from lightning_modules.sharded_loading import few
from lightning_modules.sharding import keeps_gradients

log = logging.getLogger(__name__)

IN_THE_BAR = ("train/loss", "beta/used", "filter/kept_fraction", "train/reward_accuracy", "train/pairs_per_second")
SCALED_BY_BETA = ("reward_margin", "reward_chosen", "reward_rejected")
COUNTED = ("pairs", "nonfinite_pairs")  # of an evaluation: those in its means, and those left out


@checked
class PreferenceOptimization(LanguageModelTraining):
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

    responses = SIDES
    measurer: PairMeasurer

    def __init__(
        self,
        name: str,
        beta0: PositiveFloat = 0.1,
        loss: PairLoss | None = None,
        reference: Literal["frozen", "cached"] = "frozen",
        reference_name: str | None = None,
        sft_weight: NonNegativeFloat = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-7, weight_decay=0.0),
        max_grad_norm: PositiveFloat | None = 10.0,
        max_nonfinite_share: ShareBelowOne = 0.1,
        **settings: Any,
    ):
        super().__init__(name=name, architecture=None, optimizer=optimizer, max_grad_norm=max_grad_norm, **settings)
        self.beta0 = beta0
        loss = loss or SigmoidLoss()
        if reference_name is not None and not loss.needs_reference:
            raise UserError(f"model.reference_name has no effect with {loss}, which needs none: take it out.")
        self.loss = loss.with_sft(sft_weight)
        self.reference = reference
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
            # a single micro-batch keeps its graph for the backward pass; several would need too much memory
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
        """Return the methods `name` of the callbacks (see `StepDecision`), in the Trainer's order."""
        return [getattr(one, name) for one in self.trainer.callbacks if hasattr(one, name)]  # type: ignore[attr-defined]

    def backward_all(self, batch: OptimizerBatch, micro_batches: Sequence[PackedRows]) -> PairLogps | None:
        """Back-propagate every pair's loss at β0 as it is scored; if one is not finite, drop all: return None."""
        parts: list[PairLogps] = []
        for number, rows in enumerate(micro_batches, 1):
            part = self.measurer.measure_rows(batch, [rows]).select(rows.pairs)
            losses = self.loss(part, torch.full_like(part.policy_chosen, self.beta0))
            if number < len(micro_batches):
                self.backward_share(losses, len(batch.pair_ids), last=False)
            parts.append(part.detach())
        order = torch.cat([rows.pairs for rows in micro_batches]).argsort()
        global_logps = self.measurer.gather(PairLogps.cat(parts).select(order), batch)
        if not global_logps.finite.all():  # known before the last backward pass, in which DDP exchanges gradients
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
        rounding = BFLOAT16_STD if self.compute_dtype == torch.bfloat16 else MINIMUM_STD
        rounded = replace(global_logps, policy_chosen=global_logps.policy_chosen + rounding)
        change = self.loss.discrepancy(rounded) - self.loss.discrepancy(global_logps)
        return max(float(change[torch.isfinite(change)].abs().mean().nan_to_num()), MINIMUM_STD)

    def report_nonfinite(self, decision: StepDecision) -> None:
        """Log and count the pairs without a finite gap; raise StepRefused if there are too many."""
        bad = [id for id, good in zip(decision.pair_ids, decision.eligible.tolist(), strict=True) if not good]
        if not bad:
            return
        if len(bad) > self.max_nonfinite_share * len(decision.pair_ids):
            cure = "lower the learning rate, use trainer.precision 32-true, or raise model.max_nonfinite_share"
            counts = f"{len(bad)} of {len(decision.pair_ids)} pairs"
            raise StepRefused(f"{counts} have no finite reward gap at step {decision.step} ({few(bad)}): {cure}.")
        self.nonfinite_pairs += len(bad)
        log.warning("step %d: no finite reward gap, left out: %s", decision.step, few(bad))

    # --- what is reported -------------------------------------------------------------------------------

    def log_step(self, decision: StepDecision, batch: OptimizerBatch, grad_norm: float) -> Tensor:
        """Log the step of the global batch, on the CPU, with rewards at β0 and at the β used; return the loss."""
        seen, beta = decision.logps.select(decision.eligible), decision.beta[decision.eligible]
        at_base = pair_metrics(seen, self.loss, torch.full_like(beta, self.beta0))
        at_used = pair_metrics(seen, self.loss, beta)
        kept = decision.logps.select(decision.kept)
        loss = decision.weighted_losses(kept, decision.terms(decision.kept)).mean()
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

    # --- the reference ----------------------------------------------------------------------------------

    @property
    def other_reference(self) -> str | None:
        """Return the model that the reference is loaded from; None if it is the policy at its start."""
        moved = self.lora is not None and self.lora.moves_base
        return self.reference_name or (self.name if moved else None)

    @property
    def families(self) -> list[tuple[ResponseScorer, ...]]:
        scorers = self.measurer.scorers
        return [scorers] if self.other_reference is None else [(one,) for one in scorers]

    def load_reference(self, name: str) -> ResponseScorer:
        """Return the model `name`, frozen and placed. Raises UserError if it cannot be read or has other tokens."""
        with renamed({"model.name": "model.reference_name"}):
            scorer = self.build_scorer(name, None)
            if self.data is not None:
                check_tokens(name, self.data.tokenizer, self.trust_remote_code)
            return self.place(scorer.eval().requires_grad_(False), frozen=True)

    def keep_reference(self) -> None:
        self.measurer = PairMeasurer(self.policy, self.ranks)
        if not self.loss.needs_reference:
            if self.reference == "cached":
                rank_zero_info(f"model.reference: cached has no effect with {self.loss}, which needs no reference")
        elif self.other_reference is not None:
            self.measurer.reference = self.load_reference(self.other_reference)
        elif self.reference == "frozen" and self.lora is not None:
            self.measurer.reference = self.policy  # without its adapters
        elif self.reference == "frozen":
            frozen = copy.deepcopy(self.policy).eval().requires_grad_(False)
            self.measurer.reference = self.place(frozen, frozen=True)

    def configure_model(self) -> None:
        again = hasattr(self, "policy")
        super().configure_model()
        if again or not self.loss.needs_reference or self.reference != "cached":
            return
        assert self.name is not None
        # before a checkpoint is loaded, while the policy's weights are still those of the reference; a reference
        # that is a model of its own is given up once it has scored the pairs
        self.to(self.ranks.device)
        # batches are made on the CPU, but Lightning sets the root device as the default device here
        with torch.no_grad(), torch.device("cpu"), self.trainer.precision_plugin.forward_context():
            some = self.data.batches_of(lambda keys: np.ones(len(keys), bool), CHECKED_PAIRS)
            for batch in chain.from_iterable(some):
                self.micro_batches(batch)  # settles layout and attention, which are part of the cache key
            name, measurer = self.other_reference or self.name, PairMeasurer(self.measurer.scorers[-1], self.ranks)
            cache = filled_reference_cache(name, measurer, self.compute_dtype, self.data.batches_of)
        self.measurer = PairMeasurer(self.policy, self.ranks, stored=cache.logps)

    # --- evaluation: no filter, β0, nothing of the training state is touched ------------------------------

    def on_validation_epoch_start(self) -> None:
        self._evaluation: dict[str, Metric] = {}  # also after an evaluation that was interrupted

    def validation_step(self, batch: OptimizerBatch, batch_idx: int) -> None:
        """Add the pairs of the global batch, which every rank has, to the means, and count those without a gap."""
        _, logps = self.measurer.measure(batch, self.micro_batches(batch))
        beta = torch.full((len(batch.pair_ids),), self.beta0)
        values = pair_metrics(logps, self.loss, beta)
        values |= {"loss": self.loss.bound(logps)(logps, beta), "gap_mean": self.loss.gaps(logps)}
        finite = values["gap_mean"].isfinite()
        values = {name: column[finite] for name, column in values.items()}
        values |= dict(zip(COUNTED, (finite, ~finite), strict=True))
        for name, column in values.items():
            if name not in self._evaluation:
                kind = SumMetric if name in COUNTED else MeanMetric
                # not synchronised, because every rank adds all pairs; `cpu` would reset the dtype
                self._evaluation[name] = kind(sync_on_compute=False).cpu().set_dtype(torch.float64)
            self._evaluation[name].update(column.double())

    def on_validation_epoch_end(self) -> None:
        stage = self.trainer.state.stage.dataloader_prefix  # type: ignore[union-attr]  # `val` or `test`
        figures = {name: metric.compute() for name, metric in self._evaluation.items()}
        pairs, left_out = (int(figures.get(name, 0)) for name in COUNTED)
        warn_of_nonfinite(str(stage), left_out, pairs)
        self.log_dict({f"{stage}/{name}": value for name, value in figures.items()})

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: OptimizerBatch, batch_idx: int) -> dict[str, Any]:
        """Return the columns of `scores.parquet` for this rank's pairs."""
        logps = self.measurer.measure(batch, self.micro_batches(batch))[1].select(batch.positions)
        columns: dict[str, Any] = {"pair_id": [batch.pair_ids[p] for p in batch.positions.tolist()]}
        for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"):
            column = getattr(logps, name)
            columns[f"{name}_logp"] = [None] * len(batch.positions) if column is None else column.tolist()
        columns["gap"] = self.loss.discrepancy(logps).tolist()
        columns["chosen_tokens"] = logps.chosen_tokens.long().tolist()
        columns["rejected_tokens"] = logps.rejected_tokens.long().tolist()
        return columns
