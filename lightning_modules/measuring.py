"""Log-probabilities of pairs under policy and reference: of a rank's share, and of the whole global batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from app.method.batch import OptimizerBatch, PackedRows, on_device
from app.method.logps import PairLogps
from lightning_modules.ranks import Ranks
from lightning_modules.reference import Reference
from lightning_modules.scorer import ResponseScorer, response_logps

SIDES = ("chosen", "rejected")


class PairMeasurer:
    """The policy, its reference and the ranks that measure the pairs of a batch together."""

    def __init__(self, policy: ResponseScorer, reference: Reference, ranks: Ranks):
        self.policy = policy
        self.reference = reference
        self.ranks = ranks

    @property
    def scorers(self) -> tuple[ResponseScorer, ...]:
        """Return the models, the policy first."""
        reference = self.reference.scorer
        return (self.policy, reference) if isinstance(reference, ResponseScorer) else (self.policy,)

    def rows(self, batch: OptimizerBatch, pairs: Sequence[int] | None = None) -> list[PackedRows]:
        """Return this rank's rows of `pairs` (indices into its share; None: all), the same number on every rank."""
        return self.ranks.match(self.policy.pack(batch, SIDES, pairs))

    def measure(self, batch: OptimizerBatch, micro_batches: Sequence[PackedRows]) -> tuple[PairLogps, PairLogps]:
        """Return the log-probabilities [B] of this rank's pairs, and those of all G pairs as `gather` returns them.

        Those of the policy keep their graph, but in packed rows are detached if any rank has a pair that is not
        finite (see `measured_alone`). Those of the reference have no gradient. The host waits for the device here.
        """
        logps = self.measure_rows(batch, micro_batches)
        global_logps = self.gather(logps, batch)
        if self.policy.layout == "packed" and not global_logps.finite.all():
            logps = self.measured_alone(batch, logps)
            global_logps = self.gather(logps, batch)
        return logps, global_logps

    def measure_rows(self, batch: OptimizerBatch, micro_batches: Sequence[PackedRows]) -> PairLogps:
        """Return the log-probabilities of the pairs in the rows; other pairs of the share get zeros."""
        share, device = len(batch.positions), self.ranks.device
        reference = self.reference.logps(batch, micro_batches)  # first: the policy's activations stay in memory
        policy = response_logps(self.policy, micro_batches, share, 2, device)
        tokens = torch.ones(share, 2, dtype=torch.int64, device=device)
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
        table = torch.zeros(len(own), len(batch.pair_ids), dtype=torch.float64, device=self.ranks.device)
        table[:, on_device(batch.positions, self.ranks.device)] = torch.stack([c.double() for c in own.values()])
        global_logps: dict[str, Any] = dict.fromkeys(vars(logps))
        global_logps.update(zip(own, self.ranks.reduce(table, "sum"), strict=True))
        return PairLogps(**global_logps)

    def measured_alone(self, batch: OptimizerBatch, logps: PairLogps) -> PairLogps:
        """Return `logps` [B], detached, with every pair that is not finite scored again in separate rows.

        A masked key has the attention weight 0, and 0·NaN is NaN, so one bad pair makes its whole packed row NaN.
        Separate rows use the model's own attention, which takes their mask. All ranks must call it at once.
        """
        spoilt = ~logps.finite
        suspects = torch.nonzero(spoilt).flatten().tolist()
        with torch.no_grad(), ExitStack() as attention:
            for scorer in self.scorers:
                attention.enter_context(scorer.as_loaded())
            rows = batch.micro_batches(SIDES, "separate", self.policy.balanced_row, suspects)
            again = vars(self.measure_rows(batch, self.ranks.match(rows)))
        columns = {name: column for name, column in vars(logps).items() if column is not None}
        alone = {name: torch.where(spoilt, again[name], column.detach()) for name, column in columns.items()}
        return PairLogps(**{name: alone.get(name) for name in vars(logps)})  # type: ignore[arg-type]
