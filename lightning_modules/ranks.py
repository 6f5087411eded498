"""The ranks of a run: sums over them, equal numbers of micro-batches, and the shares of a batch."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from app.method.batch import PackedRows


class Ranks:
    """The processes of a run, as the parts of a stage see them. The trainer's strategy must have set them up."""

    def __init__(self, trainer: Trainer):
        sampling = trainer.distributed_sampler_kwargs
        self.strategy = trainer.strategy
        self.device = trainer.strategy.root_device
        self.size = trainer.world_size
        self.number = trainer.global_rank
        # the shares of a batch: one per rank, or per tensor-parallel group, whose ranks work on the same pairs
        self.shares = 1 if sampling is None else int(sampling["num_replicas"])

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """Return `value` reduced over all ranks (`sum`, `mean` or `max`), on the CPU; a sum counts a share once."""
        if self.size == 1:
            return value.cpu()
        if how == "sum" and self.number % (self.size // self.shares):
            value = torch.zeros_like(value)  # the first rank of the tensor-parallel group adds it
        # a copy, because the strategy reduces in place
        return self.strategy.reduce(value.to(self.device, copy=True), reduce_op=how).cpu()

    def match(self, rows: list[PackedRows]) -> list[PackedRows]:
        """Return `rows` on this rank's device, with empty rows added up to the largest number on any rank.

        Sharded forward and backward passes are collective, so every rank must run the same number.
        """
        most = int(self.reduce(torch.tensor(len(rows)), "max"))
        return [each.to(self.device) for each in (*rows, *(PackedRows.empty() for _ in range(most - len(rows))))]
