"""The reference: a frozen model, the policy without its adapters, or none (`reference_cache` has stored values)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from app.method.batch import OptimizerBatch, PackedRows
from lightning_modules.lora import without_adapters
from lightning_modules.scorer import ResponseScorer, response_logps


class AdapterOff:
    """The reference of a policy with adapters: the policy with its adapters disabled, not a second model."""

    def __init__(self, policy: ResponseScorer):
        self.policy = policy

    def __call__(self, rows: PackedRows, **options: Any) -> Tensor:
        with without_adapters(self.policy.model):
            return self.policy(rows, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.policy.logits(hidden)  # the head has no adapter


class Reference(Protocol):
    """What a stage asks of its reference."""

    @property
    def scorer(self) -> ResponseScorer | AdapterOff | None:
        """Return the model that computes the values; None if there is no model."""
        ...

    def logps(self, batch: OptimizerBatch, rows: Sequence[PackedRows]) -> Tensor | None:
        """Return the log-probabilities [B, 2] float64 of the share's pairs; None if there is no reference.

        A model scores the pairs in `rows` alone, and the others get zeros.
        """
        ...


class NoReference:
    """The reference of losses that need none, such as SimPO."""

    scorer = None

    def logps(self, batch: OptimizerBatch, rows: Sequence[PackedRows]) -> None:
        return None


class ScoredReference:
    """A reference whose values are computed for every batch. It is no module, so checkpoints do not hold it."""

    def __init__(self, scorer: ResponseScorer | AdapterOff, device: torch.device):
        self.scorer = scorer
        self.device = device

    @torch.no_grad()
    def logps(self, batch: OptimizerBatch, rows: Sequence[PackedRows]) -> Tensor:
        return response_logps(self.scorer, rows, len(batch.positions), 2, self.device)
