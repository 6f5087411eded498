"""Re-scoring of pairs that are not finite, so that a NaN does not spread to other pairs of the same row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from app.method.batch import OptimizerBatch, PackedRows
from app.method.logps import PairLogps

if TYPE_CHECKING:
    from lightning_modules.base import LanguageModelTraining


def measured_alone(
    module: LanguageModelTraining,
    measure: Callable[[OptimizerBatch, list[PackedRows]], PairLogps],
    batch: OptimizerBatch,
    logps: PairLogps,
) -> PairLogps:
    """Return `logps` [B], detached, with every pair that is not finite scored again in separate rows.

    A masked key has the attention weight 0, and 0·NaN is NaN, so one bad pair makes its whole packed row NaN.
    Separate rows use the model's own attention, which takes their mask. Must be called on every rank at once.
    """
    spoilt = ~logps.finite
    suspects = torch.nonzero(spoilt).flatten().tolist()
    with torch.no_grad(), ExitStack() as attention:
        for scorer in module.scorers:
            attention.enter_context(scorer.as_loaded())
        rows = batch.micro_batches(module.responses, "separate", module.policy.balanced_row, suspects)
        again = vars(measure(batch, module.match_ranks(rows)))
    columns = {name: column for name, column in vars(logps).items() if column is not None}
    alone = {name: torch.where(spoilt, again[name], column.detach()) for name, column in columns.items()}
    return PairLogps(**{name: alone.get(name) for name in vars(logps)})  # type: ignore[arg-type]
