"""Scoring of pairs under policy and reference, and the stages that need no update: evaluation and prediction."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torchmetrics import MeanMetric, Metric, SumMetric

from app.core.errors import UserError
from app.method.batch import OptimizerBatch
from app.method.pair_loss import PairLoss, pair_metrics
from lightning_modules.base import LanguageModelTraining, warn_of_nonfinite
from lightning_modules.layout_check import CHECKED_PAIRS
from lightning_modules.measuring import SIDES, PairMeasurer
from lightning_modules.reference_cache import filled_reference_cache
from lightning_modules.refused_models import check_tokens
from lightning_modules.scorer import ResponseScorer

ReferenceKind = Literal["frozen", "cached"]
# of an evaluation: the pairs in its means, on which their uncertainty depends, and those left out
COUNTED = ("pairs", "nonfinite_pairs")


class PreferenceScoring(LanguageModelTraining):
    """A stage that scores pairs under policy and reference for training steps, evaluation and `predict`."""

    responses = SIDES
    beta0: float  # which evaluation uses for rewards and loss
    loss: PairLoss
    reference: ReferenceKind
    reference_name: str | None
    measurer: PairMeasurer
    _evaluation: dict[str, Metric]

    @property
    def other_reference(self) -> str | None:
        """Return the model that the reference is loaded from; None if the policy is the reference at its start."""
        moved = self.lora is not None and self.lora.moves_base
        return self.reference_name or (self.name if moved else None)

    @property
    def families(self) -> list[tuple[ResponseScorer, ...]]:
        scorers = self.measurer.scorers
        return [scorers] if self.other_reference is None else [(one,) for one in scorers]

    def load_reference(self, name: str) -> ResponseScorer:
        """Return the model `name`, frozen and placed. Raises UserError if it cannot be read or has other tokens."""
        try:
            scorer = self.build_scorer(name, None)
            if self.data is not None:
                check_tokens(name, self.data.tokenizer, self.trust_remote_code)
            return self.place(scorer.eval().requires_grad_(False), frozen=True)
        except UserError as error:
            raise UserError(str(error).replace("model.name", "model.reference_name")) from error

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
            few = self.data.batches_of(lambda keys: np.ones(len(keys), bool), CHECKED_PAIRS)
            for batch in chain.from_iterable(few):
                self.micro_batches(batch)  # settles layout and attention, which are part of the cache key
            name, measurer = self.other_reference or self.name, PairMeasurer(self.measurer.scorers[-1], self.ranks)
            cache = filled_reference_cache(name, measurer, self.compute_dtype, self.data.batches_of)
        self.measurer = PairMeasurer(self.policy, self.ranks, stored=cache.logps)

    # --- evaluation: no filter, β0, nothing of the training state is touched ------------------------------

    def on_validation_epoch_start(self) -> None:
        self._evaluation = {}  # also after an evaluation that was interrupted

    def validation_step(self, batch: OptimizerBatch, batch_idx: int) -> None:
        """Add the pairs of the global batch to the means, in which each counts once for any number of ranks.

        The values of all pairs are on the CPU of every rank, so the metrics neither wait nor synchronise. A pair
        without a finite gap enters no mean and is counted in `nonfinite_pairs`.
        """
        _, logps = self.measurer.measure(batch, self.micro_batches(batch))
        beta = torch.full((len(batch.pair_ids),), self.beta0)
        values = pair_metrics(logps, self.loss, beta)
        values |= {"loss": self.loss.bound(logps)(logps, beta), "gap_mean": self.loss.gaps(logps)}
        finite = values["gap_mean"].isfinite()
        values = {name: column[finite] for name, column in values.items()}
        values |= dict(zip(COUNTED, (finite, ~finite), strict=True))
        for name, column in values.items():
            if name not in self._evaluation:
                # in float64 on the CPU, and not synchronised, because every rank adds all pairs
                metric = SumMetric if name in COUNTED else MeanMetric
                self._evaluation[name] = metric(sync_on_compute=False).set_dtype(torch.float64).cpu()
            self._evaluation[name].update(column.double())

    def on_validation_epoch_end(self) -> None:
        stage = self.trainer.state.stage.dataloader_prefix  # type: ignore[union-attr]  # `val` or `test`
        figures = {name: metric.compute() for name, metric in self._evaluation.items()}
        warn_of_nonfinite(str(stage), int(figures.get("nonfinite_pairs", 0)), int(figures.get("pairs", 0)))
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
