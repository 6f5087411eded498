"""Supervised fine-tuning on the chosen responses, the stage before preference optimisation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from app.method.batch import OptimizerBatch
from app.method.ranges import PositiveFloat, checked
from lightning_modules.base import LanguageModelTraining, warn_of_nonfinite
from lightning_modules.scorer import response_logps


@checked
class SupervisedFineTuning(LanguageModelTraining):
    """The stage whose loss is the mean negative log-likelihood per response token of the global batch.

    Args: see `LanguageModelTraining`. Give `architecture` instead of `name` to train a new small model.
    """

    responses = ("chosen",)

    def __init__(
        self,
        name: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        max_grad_norm: PositiveFloat | None = 1.0,
        **settings: Any,
    ):
        super().__init__(name, optimizer, max_grad_norm, **settings)

    def training_step(self, batch: OptimizerBatch, batch_idx: int) -> Tensor:
        micro_batches = self.micro_batches(batch)
        tokens = float(self.ranks.reduce(torch.tensor(sum(len(rows.target_ids) for rows in micro_batches)), "sum"))
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, rows in enumerate(micro_batches, 1):
            loss += self.backward_share(-self.policy(rows), tokens, last=number == len(micro_batches))
        grad_norm = self.update()
        loss, seconds = self.ranks.reduce(loss, "mean"), self.step_seconds()
        self.log_dict({"train/loss": loss, "train/pairs_per_second": len(batch.pair_ids) / seconds}, prog_bar=True)
        self.log_dict({"train/grad_norm": grad_norm, "train/tokens_per_second": batch.tokens / seconds})
        return loss

    def on_validation_epoch_start(self) -> None:
        # of every validation batch, sums over this rank's finite pairs: −log π, tokens, pairs, and pairs left out
        self._validation: list[Tensor] = []

    def validation_step(self, batch: OptimizerBatch, batch_idx: int) -> None:
        micro_batches = self.micro_batches(batch)
        logps = torch.cat([self.policy(rows) for rows in micro_batches])
        pairs = torch.cat([rows.pairs for rows in micro_batches])
        spoilt = ~logps.isfinite()
        if self.policy.layout == "packed" and self.ranks.reduce(spoilt.any().int(), "max"):
            suspects = pairs[spoilt].tolist()  # all of a row with one that is not finite
            with self.policy.as_loaded():
                rows = batch.micro_batches(self.responses, "separate", self.policy.balanced_row, suspects)
                alone = response_logps(self.policy, self.ranks.match(rows), len(batch.positions), 1, self.device)
            logps = torch.where(spoilt, alone[pairs, 0], logps)
        tokens = torch.cat([rows.response_tokens for rows in micro_batches]).to(logps)
        finite = logps.isfinite()
        loss = -logps.where(finite, 0)
        self._validation.append(torch.stack([loss, tokens * finite, finite.double(), (~finite).double()]).sum(1))

    def on_validation_epoch_end(self) -> None:
        loss, tokens, pairs, left_out = self.ranks.reduce(torch.stack(self._validation).sum(0), "sum")
        warn_of_nonfinite("val", int(left_out), int(pairs))
        self.log("val/loss", loss / tokens, prog_bar=True)
        self.log("val/nonfinite_pairs", left_out)
