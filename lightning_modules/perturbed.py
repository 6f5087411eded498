"""Log-probability gaps under perturbed logits, for ε-DPO: policy and reference side by side, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from app.method.batch import OptimizerBatch, PackedRows
from app.method.epsilon import perturbed_logits
from lightning_modules.lora import AdapterOff
from lightning_modules.scorer import ResponseScorer, response_sums, token_logps
from lightning_modules.sharding import gather_root

if TYPE_CHECKING:
    from lightning_modules.preference_scoring import PreferenceScoring

CHUNK_TOKENS = 512  # response tokens whose logits [chunk, V] exist at a time, of both models


@torch.no_grad()
def perturbed_gaps(
    module: PreferenceScoring, batch: OptimizerBatch, eligible: Tensor, epsilons: Sequence[float]
) -> Tensor:
    """log π(y_w|x) − log π(y_l|x) under (1+ε)·logits_θ − ε·logits_ref, [len(epsilons), G] float64 on the CPU.

    Pairs that are not `eligible` [G] are left out of the rows, which they would spoil, and get NaN. Costs one
    forward pass of policy and reference more; called on every rank at once.
    """
    (reference,) = module._reference
    here = torch.nonzero(eligible[batch.positions]).flatten().tolist()
    gaps = torch.zeros(len(epsilons), len(batch.pair_ids), dtype=torch.float64, device=module.device)
    positions = batch.positions.to(module.device)
    for rows in module.micro_batches(batch, here):
        sums = perturbed_sums(module.policy, reference, rows, epsilons).view(len(epsilons), -1, 2)
        gaps[:, positions[rows.pairs]] = sums[..., 0] - sums[..., 1]
    return module.reduce(gaps, "sum").masked_fill(~eligible, torch.nan)


def perturbed_sums(
    policy: ResponseScorer, reference: ResponseScorer | AdapterOff, rows: PackedRows, epsilons: Sequence[float]
) -> Tensor:
    """Summed log-probabilities [len(epsilons), S] float64 of the responses under each perturbation.

    Never more than one chunk of logits [chunk, V] of either model exists at a time.
    """
    hidden = [scorer(rows, hidden_only=True) for scorer in (policy, reference)]
    for scorer in (policy, reference):
        if isinstance(scorer, ResponseScorer):  # without a second model the policy's root is all there is
            gather_root(scorer)
    chunks = [part.split(CHUNK_TOKENS) for part in (*hidden, rows.target_ids)]
    per_token: list[list[Tensor]] = [[] for _ in epsilons]
    for policy_hidden, reference_hidden, targets in zip(*chunks, strict=True):
        logits, fixed = policy.logits(policy_hidden), reference.logits(reference_hidden)
        for column, epsilon in zip(per_token, epsilons, strict=True):
            column.append(token_logps(perturbed_logits(logits, fixed, epsilon), targets))
    return torch.stack([response_sums(torch.cat(column), rows) for column in per_token])
