"""Attention pair by pair: what a row of pairs costs on a CPU when nobody computes what the mask would hide.

A dense mask makes attention cost the square of the row; here it costs what the pairs cost by themselves, so that
all pairs of a micro-batch can lie in one row without any padding. It needs no compiler and no kernel of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.pair_runs import PairRuns, register

PAIRWISE = "pairwise"  # the name under which transformers knows it


def piece_mask(runs: PairRuns, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
    """Which of `keys` the last `queries` of them see, [queries, keys] additive; None where causal order does."""
    window = None if window is None or keys <= window else window
    if queries == keys and window is None:
        return None

    def make() -> Tensor:
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(queries, keys, dtype=like.dtype).masked_fill_(hidden, -torch.inf).to(like.device)

    return runs.made((PAIRWISE, queries, keys, window, like.dtype), make)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: PairRuns,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """See `pair_runs.Attend`."""
    if softcap is not None:
        raise ValueError(f"attention {PAIRWISE} has no softcap")
    # tokens of every piece: the prompt with the first response, then each other response
    sizes = [size for prompt, (first, *rest) in runs.runs for size in (prompt + first, *rest)]
    # split, not sliced: a slice's gradient is as large as the whole
    queries, keys, values = (states.split(sizes, dim=2) for states in (query, key, value))
    outputs: list[Tensor] = []
    for prompt, responses in runs.runs:
        whole = len(outputs)
        for number in range(len(responses)):
            q, k, v = (pieces[len(outputs)] for pieces in (queries, keys, values))
            if number:
                k, v = (torch.cat([p[whole][:, :, :prompt], own], 2) for p, own in ((keys, k), (values, v)))
            mask = piece_mask(runs, q.shape[2], k.shape[2], window, q)
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
    return torch.cat(outputs, 2)


register(PAIRWISE, attend)
