"""The start-up check: does this model's packed forward give the log-probabilities of plain rows?"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from app.errors import UserError
from app.method.batch import Layout, OptimizerBatch, PackedRows

if TYPE_CHECKING:
    from lightning_modules.base import LanguageModelTraining

log = logging.getLogger(__name__)

# Largest mean difference per response token, in nats, that rounding explains. A lost mask costs whole nats.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2}
CHECKED_PAIRS = 4


def agreeing_layout(module: LanguageModelTraining, batch: OptimizerBatch) -> Layout:
    """Score a few pairs packed, and in plain rows with the model's own head; return the layout to train with.

    The attention is settled with it: pair by pair where that agrees, else the model's own.
    Raises UserError when `layout: packed` or an attention that was asked for does not hold, or when not even this
    project's head agrees with the model's own on plain rows.
    """
    tolerance = TOLERANCE[module.compute_dtype]
    pairs = list(range(min(CHECKED_PAIRS, len(batch.positions))))

    def laid_out(layout: Layout) -> list[PackedRows]:
        # as few rows as possible, so that several pairs share one
        return module.match_ranks(batch.micro_batches(module.responses, layout, math.inf, pairs))

    plain = laid_out("separate")
    with module.policy.with_own_attention():
        expected = _score(module, plain, whole_logits=True)
        # a pair that is not finite says nothing about the model, and would spoil the row that it is packed into
        pairs = [pair for pair in pairs if torch.isfinite(expected[pair]).all()]
        error = _largest_error(module, _score(module, plain), expected, plain)
    if error > tolerance:
        raise UserError(
            f"model.name: the output head of {module.name or 'this architecture'} is not supported: "
            "its log-probabilities differ from those of transformers' own forward pass."
        )
    findings: list[str] = []
    for attention, layout in _candidates(module):
        for scorer in module.scorers:
            scorer.use_attention(attention)
        if (attention, layout) == (module.policy.own_attention, "separate"):
            break  # what the others are compared with
        try:
            error = _largest_error(module, _score(module, laid_out(layout)), expected, plain)
        except (TypeError, ValueError, RuntimeError) as refusal:  # a family with a mask format of its own
            findings.append(
                f"this model does not take the mask of packed rows ({attention}: {str(refusal).splitlines()[0]})"
            )
        else:
            if error <= tolerance:
                break
            findings.append(
                f"packed rows change this model's log-probabilities by {error:.2g} nats per token ({attention})"
            )
    else:
        cure = "model.layout: {}; set it to auto or separate."
        if module.requested_layout != "packed":
            cure = "model.attention: {}; set it to auto."
        raise UserError(cure.format(findings[-1]))
    if findings and layout == "separate":
        log.warning("model.layout auto: %s, so every response gets a row of its own (slower).", findings[-1])
    elif findings:
        log.info("%s, so the model's own attention is used, with a mask: slower on long rows.", findings[-1])
    return layout


def _candidates(module: LanguageModelTraining) -> list[tuple[str, Layout]]:
    """Attention and layout in the order in which they are wanted."""
    current, own = module.policy.attention, module.policy.own_attention
    attentions = list(dict.fromkeys([current, own])) if module.attention == "auto" else [current]
    packed: list[tuple[str, Layout]] = [(attention, "packed") for attention in attentions]
    separate: list[tuple[str, Layout]] = [(attention, "separate") for attention in attentions]
    if module.requested_layout == "auto":
        return [*packed, separate[-1]]
    return packed if module.requested_layout == "packed" else separate


@torch.no_grad()
def _score(module: LanguageModelTraining, rows: Sequence[PackedRows], whole_logits: bool = False) -> torch.Tensor:
    scorer = partial(module.policy, whole_logits=True) if whole_logits else module.policy
    return module.score(scorer, rows, CHECKED_PAIRS).cpu()


def _largest_error(
    module: LanguageModelTraining, seen: torch.Tensor, expected: torch.Tensor, rows: Sequence[PackedRows]
) -> float:
    """Largest difference per response token of finite scores over all ranks, so that every rank decides alike."""
    tokens = torch.ones_like(expected)
    for micro_batch in rows:
        lengths = micro_batch.response_tokens.view(-1, tokens.shape[1])  # of an empty one as well
        tokens = tokens.index_copy(0, micro_batch.pairs.cpu(), lengths.double().cpu())
    apart = ((seen - expected).abs() / tokens).nan_to_num(nan=math.inf)
    return float(module.reduce(apart.masked_fill(~torch.isfinite(expected), 0).max(), "max"))
