"""Scoring of pairs under policy and reference, and the stages that need no update: evaluation and prediction."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torchmetrics import Metric

from app.method.batch import OptimizerBatch, PackedRows, on_device
from app.method.logps import PairLogps
from app.method.losses import PairLoss
from app.method.metrics import pair_metrics
from lightning_modules.base import LanguageModelTraining
from lightning_modules.contagion import measured_alone
from lightning_modules.logged_training import exact_count, exact_mean, warn_of_nonfinite
from lightning_modules.lora import AdapterOff
from lightning_modules.reference_cache import ReferenceCache, filled_reference_cache
from lightning_modules.scorer import ResponseScorer

Reference = Literal["frozen", "cached"]


class PreferenceScoring(LanguageModelTraining):
    """A stage that scores pairs under policy and reference for training steps, evaluation and `predict`.

    Args:
        beta0: β0, which evaluation uses for rewards and loss.
        loss: per-pair loss of the log-probabilities and β.
        reference: `frozen`, a second copy of the model, or `cached`, log-probabilities that the untrained policy
            scores once and that are kept on disk (see `reference_cache`).
        settings: the arguments of `LanguageModelTraining`, in its order.
    """

    responses = ("chosen", "rejected")

    def __init__(self, beta0: float, loss: PairLoss, reference: Reference, *settings: Any):
        super().__init__(*settings)
        self.beta0 = beta0
        self.loss = loss
        self.reference = reference
        self._reference_cache: ReferenceCache | None = None
        # In a tuple, so that it is no submodule: a registered reference would enter checkpoints, break the
        # sharded resume and be switched to train mode.
        self._reference: tuple[ResponseScorer | AdapterOff, ...] = ()
        self._evaluation: dict[str, Metric] = {}

    def keep_reference(self, fresh: ResponseScorer) -> None:
        if not self.loss.needs_reference or self.reference != "frozen":
            return
        if self.lora is not None:
            self._reference = (AdapterOff(fresh),)
        else:
            reference = copy.deepcopy(fresh).eval().requires_grad_(False)
            self._reference = (self.place(reference, frozen=True),)

    def on_policy_ready(self) -> None:
        if self.loss.needs_reference and self.reference == "cached":
            # before a checkpoint is loaded, while the policy's weights are still those of the reference
            self.to(self.trainer.strategy.root_device)
            self._reference_cache = filled_reference_cache(self)

    @property
    def scorers(self) -> tuple[ResponseScorer, ...]:
        return (self.policy, *(one for one in self._reference if isinstance(one, ResponseScorer)))

    # --- measuring --------------------------------------------------------------------------------------

    def measure(self, batch: OptimizerBatch, micro_batches: Sequence[PackedRows]) -> tuple[PairLogps, PairLogps]:
        """Return the log-probabilities [B] of this rank's pairs, and those of all G pairs as `gather` returns them.

        Those of the policy keep their graph, but in packed rows are detached if any rank has a pair that is not
        finite (see `measured_alone`). Those of the reference have no gradient. The host waits for the device here.
        """
        logps = self.measure_rows(batch, micro_batches)
        global_logps = self.gather(logps, batch)
        if self.layout == "packed" and not global_logps.finite.all():
            logps = measured_alone(self, self.measure_rows, batch, logps)
            global_logps = self.gather(logps, batch)
        return logps, global_logps

    def measure_rows(self, batch: OptimizerBatch, micro_batches: Sequence[PackedRows]) -> PairLogps:
        """Return the log-probabilities of the pairs in the rows; other pairs of the share get zeros."""
        share = len(batch.positions)
        reference = None
        if self._reference_cache is not None:
            reference = on_device(self._reference_cache.logps(batch.pair_keys.numpy()), self.device)
        elif self._reference:  # before the policy, whose activations stay in memory
            with torch.no_grad():
                reference = self.score(self._reference[0], micro_batches, share)
        policy = self.score(self.policy, micro_batches, share)
        tokens = torch.ones(share, 2, dtype=torch.int64, device=self.device)
        for rows in micro_batches:
            tokens[rows.pairs] = rows.response_tokens.view(-1, 2)
        return PairLogps(
            policy_chosen=policy[:, 0],
            policy_rejected=policy[:, 1],
            reference_chosen=None if reference is None else reference[:, 0],
            reference_rejected=None if reference is None else reference[:, 1],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
        )

    def gather(self, logps: PairLogps, batch: OptimizerBatch) -> PairLogps:
        """Return `logps` of all G pairs of the global batch, detached, on the CPU, equal on every rank.

        Each rank writes its pairs at their positions in the global batch, and one sum over ranks of O(G) numbers
        joins them.
        """
        own = {name: column.detach() for name, column in vars(logps).items() if column is not None}
        table = torch.zeros(len(own), len(batch.pair_ids), dtype=torch.float64, device=self.device)
        table[:, on_device(batch.positions, self.device)] = torch.stack([c.double() for c in own.values()])
        global_logps: dict[str, Any] = dict.fromkeys(vars(logps))
        global_logps.update(zip(own, self.reduce(table, "sum"), strict=True))
        return PairLogps(**global_logps)

    # --- evaluation: no filter, β0, nothing of the training state is touched ------------------------------

    def validation_step(self, batch: OptimizerBatch, batch_idx: int) -> None:
        self.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self.log_evaluation("val")

    def test_step(self, batch: OptimizerBatch, batch_idx: int) -> None:
        self.evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self.log_evaluation("test")

    def evaluate(self, batch: OptimizerBatch) -> None:
        """Add this rank's pairs to the running means, in which every pair counts once for any number of ranks.

        A pair without a finite gap enters no mean and is counted in `nonfinite_pairs`.
        """
        logps, global_logps = self.measure(batch, self.micro_batches(batch))
        batch_loss = self.loss.for_batch(global_logps)
        beta = torch.full((len(batch.positions),), self.beta0, device=self.device)
        values = pair_metrics(logps, self.loss, beta) | {
            "loss": batch_loss(logps, beta),
            "gap_mean": self.loss.discrepancy(logps),
        }
        finite = values["gap_mean"].isfinite()
        for name, column in values.items():
            if name not in self._evaluation:
                self._evaluation[name] = exact_mean().to(self.device)
            self._evaluation[name].update(column[finite])
        # the number of pairs in the means, which their uncertainty depends on
        good = int(self.loss.discrepancy(global_logps).isfinite().sum())
        for name, count in (("pairs", good), ("nonfinite_pairs", len(batch.pair_ids) - good)):
            self._evaluation.setdefault(name, exact_count().to(self.device)).update(float(count))

    def log_evaluation(self, stage: str) -> None:
        figures = {name: metric.compute() for name, metric in self._evaluation.items()}
        warn_of_nonfinite(stage, figures)
        self.log_dict({f"{stage}/{name}": value for name, value in figures.items()})
        self._evaluation.clear()

    def predict_step(self, batch: OptimizerBatch, batch_idx: int) -> dict[str, Any]:
        """Return the columns of `scores.parquet` for this rank's pairs."""
        logps, _ = self.measure(batch, self.micro_batches(batch))
        columns: dict[str, Any] = {"pair_id": [batch.pair_ids[p] for p in batch.positions.tolist()]}
        for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"):
            column = getattr(logps, name)
            columns[f"{name}_logp"] = [None] * len(batch.positions) if column is None else column.tolist()
        columns["gap"] = self.loss.discrepancy(logps).tolist()
        columns["chosen_tokens"] = logps.chosen_tokens.tolist()
        columns["rejected_tokens"] = logps.rejected_tokens.tolist()
        return columns
