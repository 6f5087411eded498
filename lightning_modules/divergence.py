"""Values that need the logits of policy and reference together: gaps under perturbation (ε-DPO) and the KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from app.method.batch import OptimizerBatch, PackedRows, on_device
from app.method.epsilon import perturbed_logits
from app.method.logps import token_kl
from lightning_modules.measuring import AdapterOff, PairMeasurer
from lightning_modules.scorer import ResponseScorer, response_sums, token_logps
from lightning_modules.sharding import gather_root

CHUNK_TOKENS = 512  # response tokens whose logits [chunk, V] of both models are in memory at a time
# logits [n, V] of the policy, of the reference, targets [n] → K numbers per response token, [K, n]
Comparison = Callable[[Tensor, Tensor, Tensor], Tensor]


def perturbed_gaps(
    measurer: PairMeasurer, batch: OptimizerBatch, eligible: Tensor, epsilons: Sequence[float]
) -> Tensor:
    """Return log π(y_w|x) − log π(y_l|x) under (1+ε)·logits_θ − ε·logits_ref, [len(epsilons), G] float64, CPU.

    Pairs that are not `eligible` get NaN. The cost is that of `response_table`.
    """

    def perturbed(logits: Tensor, fixed: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([token_logps(perturbed_logits(logits, fixed, one), targets) for one in epsilons])

    table = response_table(measurer, batch, eligible, perturbed, len(epsilons))
    return table[..., 0] - table[..., 1]


def reference_kl(measurer: PairMeasurer, batch: OptimizerBatch, eligible: Tensor) -> Tensor:
    """Return KL(π‖π_ref) summed over the tokens of chosen and rejected responses, [2, G] float64 on the CPU.

    The KL at every position is exact, because it compares the full next-token distributions; the prefixes are those
    of the data (TDPO's sequential KL, arXiv 2404.11999, in the direction of RLHF's penalty). Pairs that are not
    `eligible` get NaN. The cost is that of `response_table`.
    """

    def kl(logits: Tensor, fixed: Tensor, targets: Tensor) -> Tensor:
        return token_kl(logits, fixed)[None]

    return response_table(measurer, batch, eligible, kl, 1)[0].T


@torch.no_grad()
def response_table(
    measurer: PairMeasurer, batch: OptimizerBatch, eligible: Tensor, compare: Comparison, size: int
) -> Tensor:
    """Return `compare` (K = `size`) summed over each response of the global batch, [K, G, 2] float64 on the CPU.

    Pairs that are not `eligible` [G] are left out of the rows, which they could make NaN, and get NaN. It costs an
    extra forward pass of policy and reference and must be called on every rank at once.
    """
    policy, reference, ranks = measurer.policy, measurer.reference, measurer.ranks
    assert reference is not None
    here = torch.nonzero(eligible[batch.positions]).flatten().tolist()
    table = torch.zeros(size, len(batch.pair_ids), 2, dtype=torch.float64, device=ranks.device)
    positions = on_device(batch.positions, ranks.device)
    for rows in measurer.rows(batch, here):
        sums = compared_sums(policy, reference, rows, compare, size)
        table[:, positions[rows.pairs]] = sums.view(size, -1, 2)
    return ranks.reduce(table, "sum").masked_fill(~eligible[:, None], torch.nan)


def compared_sums(
    policy: ResponseScorer, reference: ResponseScorer | AdapterOff, rows: PackedRows, compare: Comparison, size: int
) -> Tensor:
    """Return `compare` summed over each of the S responses, [K, S] float64.

    At most one chunk of logits [chunk, V] of each model is in memory at a time.
    """
    hidden = [scorer(rows, hidden_only=True) for scorer in (policy, reference)]
    for scorer in (policy, reference):
        if isinstance(scorer, ResponseScorer):  # `AdapterOff` uses the policy's root
            gather_root(scorer)
    chunks = [part.split(CHUNK_TOKENS) for part in (*hidden, rows.target_ids)]
    per_token = [
        compare(policy.logits(ours), reference.logits(fixed), targets)
        for ours, fixed, targets in zip(*chunks, strict=True)
    ]
    return torch.stack([response_sums(column, rows) for column in torch.cat(per_token, dim=1)])
