"""RE-PO: how reliable each annotator is, and how likely each label is right (arXiv 2509.24159)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LEAST = 1e-12  # of η and 1 − η: at 0 or 1 no later pair could move the posterior


def label_confidence(label_logits: Tensor, reliability: Tensor) -> Tensor:
    """Return w = ηp/(ηp + (1 − η)(1 − p)) [n], the posterior that each label is right (eq. 4).

    `label_logits` [n] are log p/(1 − p) (`PairLoss.label_logit`), `reliability` η [n] is that of the pair's
    annotator, in (0, 1). NaN where the logit is NaN.
    """
    return torch.sigmoid(label_logits.detach() + torch.logit(reliability))


def updated_reliability(
    reliability: Mapping[str, float], annotators: Sequence[str], confidence: Tensor, momentum: float
) -> dict[str, float]:
    """Return η ← (1 − a)·η + a·mean w of the annotators in the batch, a = `momentum`; other annotators keep theirs.

    `annotators` and `confidence` w belong to the same n pairs; `reliability` names all of them. η stays inside
    [LEAST, 1 − LEAST].
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(annotators):
        places.setdefault(name, []).append(place)
    updated = dict(reliability)
    for name, own in places.items():
        newest = (1.0 - momentum) * reliability[name] + momentum * float(confidence[own].mean())
        updated[name] = min(max(newest, LEAST), 1.0 - LEAST)
    return updated
