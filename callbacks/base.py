"""What callbacks that decide over a step share: state, refused losses, the seed, statistics, label columns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from app.core.errors import UserError
from app.method.dynamic_beta import Moments
from app.method.pair_loss import PairLoss
from app.method.ranges import is_finite
from app.method.step import StepDecision


class Decider(Callback):
    """A callback that changes the step; the checkpoint has its attributes named in `saved`."""

    # both of builtin names alone: jsonargparse reads them in the module of a subclass
    saved: tuple[str, ...] = ()
    seed: int | None = None  # of the draws of a callback that has some; None becomes the run's `seed_everything`

    def refusal(self, loss: PairLoss) -> str:
        """Return why the callback does not go with `loss`, and the cure, as a clause; empty if it does."""
        return ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (loss := loss_of(pl_module)) is None:
            rank_zero_info(f"{type(self).__name__} has no effect on a stage without a preference loss")
        elif reason := self.refusal(loss):
            raise UserError(f"{type(self).__name__}: {loss} {reason}.")
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


def loss_of(pl_module: LightningModule) -> PairLoss | None:
    """Return the preference loss of a stage; None for a stage without one."""
    loss = getattr(pl_module, "loss", None)
    return loss if isinstance(loss, PairLoss) else None


def moments_for(asker: Callback, decision: StepDecision) -> Moments:
    """Return M0 and σ of the step; raise UserError if no statistics ran before the callback `asker`."""
    if decision.moments is None:
        cure = "fill the slot `statistics` (`--statistics RewardGapStatistics`; in Python, an earlier callback)"
        raise UserError(f"{type(asker).__name__} needs the running reward-gap statistics: {cure}.")
    return decision.moments


def label_column(
    labels: Mapping[str, Sequence[object]], column: str, asker: Callback, cure: str
) -> Sequence[object]:
    """Return one of the `labels`, [G], to the callback `asker`; raise UserError with the `cure` if it is none."""
    if column not in labels:
        missing = f"the data has no column {column!r}; it has these: {', '.join(labels) or 'none'}"
        raise UserError(f"{type(asker).__name__}: {missing}. {cure}.")
    return labels[column]


class Scored(Decider):
    """A decider by two columns of the data, which hold a score of either response."""

    slot: str
    chosen: str
    rejected: str

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the scores of all pairs, so that none stops the run in its middle. Raises UserError."""
        if loss_of(pl_module) is None:
            return
        loader: Any = trainer.train_dataloader
        rows = loader.table.reachable(loader.indices)
        for part in np.array_split(rows, len(rows) // 65536 + 1):  # not all labels in memory at once
            self.score_gap(loader.table.pair_ids(part), loader.table.labels(part))

    def score_gap(self, pair_ids: Sequence[str], labels: Mapping[str, Sequence[object]]) -> Tensor:
        """Return column `chosen` minus `rejected` of these pairs, [G] float64. Raises UserError."""
        columns = []
        for name in (self.chosen, self.rejected):
            cure = f"Add it to the data, or name another by --{self.slot}.chosen and --{self.slot}.rejected"
            values: Any = label_column(labels, name, self, cure)
            for pair_id, value in zip(pair_ids, values, strict=True):
                if not is_finite(value):
                    wrong = f"column {name!r} of pair {pair_id} holds {value!r}, which is no finite number"
                    raise UserError(f"{type(self).__name__}: {wrong}: correct the data or leave that pair out.")
            columns.append(torch.tensor([float(value) for value in values], dtype=torch.float64))
        return columns[0] - columns[1]
