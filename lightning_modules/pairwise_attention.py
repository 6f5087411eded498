"""Attention pair by pair, by SDPA (the default on CPUs) or by FlashAttention, and what all attentions here share.

With a dense mask the cost of attention is quadratic in the row. Pair by pair it is the sum of the costs of the
pairs, so all pairs of a micro-batch can be in one row without padding. It needs no mask and no compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from app.method.batch import Memory, PairRun, on_device
from lightning_modules.head import compute_dtype

PAIRWISE, VARLEN = "pairwise", "varlen"  # their names in transformers


class Piece(NamedTuple):
    """Queries next to each other in a row: a prompt with its first response, or another response.

    Their keys are the `shared` tokens of the prompt, if it is in another piece, and the tokens of the piece itself.
    """

    start: int
    tokens: int
    prompt: int  # where the prompt begins
    shared: int


@dataclass
class PairRuns(Memory):
    """The ordered runs of one row, with what all layers, policy and reference derive from them."""

    runs: Sequence[PairRun]

    @cached_property
    def pieces(self) -> list[Piece]:
        """Return the pieces of the row in order."""
        pieces: list[Piece] = []
        end = 0
        for prompt, responses in self.runs:
            begin = end
            for number, response in enumerate(responses):
                tokens, shared = (response, prompt) if number else (prompt + response, 0)
                pieces.append(Piece(end, tokens, begin, shared))
                end += tokens
        return pieces


class Options(NamedTuple):
    """The options of a layer's attention."""

    window: int | None  # keys that a query sees, itself included, counted within the pair
    scale: float | None
    softcap: float | None


def piece_mask(runs: PairRuns, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
    """Return the additive mask [queries, keys] of the last `queries` of `keys` tokens; None if plain causal."""
    window = None if window is None or keys <= window else window
    if queries == keys and window is None:
        return None

    def make() -> Tensor:
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(queries, keys, dtype=like.dtype).masked_fill_(hidden, -torch.inf).to(like.device)

    return runs.remember((PAIRWISE, queries, keys, window, like.dtype), make)


def attend_pairwise(query: Tensor, key: Tensor, value: Tensor, runs: PairRuns, options: Options) -> Tensor:
    """Return attention [1, heads, T, d] of `query` to `key` and `value` [1, key heads, T, d], by SDPA."""
    # split, because the gradient of a slice is as large as the whole tensor
    sizes = [piece.tokens for piece in runs.pieces]
    split = (states.split(sizes, dim=2) for states in (query, key, value))
    outputs: list[Tensor] = []
    whole: tuple[Tensor, ...] = ()  # keys and values of the piece that holds the prompt
    for piece, q, k, v in zip(runs.pieces, *split, strict=True):
        if piece.shared:
            k, v = (torch.cat([s[:, :, : piece.shared], own], 2) for s, own in zip(whole, (k, v), strict=True))
        else:
            whole = k, v
        mask = piece_mask(runs, q.shape[2], k.shape[2], options.window, q)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, 2)


def key_pieces(runs: PairRuns, device: torch.device) -> tuple[Any, ...]:
    """Return indices [K] int64 of the keys of every piece, and the bounds of the pieces for `varlen_attn`.

    These are offsets [pieces + 1] int32 of queries and keys, and the longest of each, as numbers on the host.
    """
    pieces = np.array(runs.pieces)
    queries, lengths = pieces[:, 1], pieces[:, 1] + pieces[:, 3]
    keys = [np.r_[prompt : prompt + shared, start : start + tokens] for start, tokens, prompt, shared in pieces]
    offsets = (np.cumsum([0, *sizes], dtype=np.int32) for sizes in (queries, lengths))
    tensors = (on_device(torch.from_numpy(each), device) for each in (np.concatenate(keys), *offsets))
    return *tensors, int(queries.max()), int(lengths.max())


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, runs: PairRuns, options: Options) -> Tensor:
    """Return the same by FlashAttention.

    `varlen_attn` aligns causal order at the ends of queries and keys, so a response sees all the prompt.
    """
    keys, *bounds = runs.remember(VARLEN, lambda: key_pieces(runs, query.device))
    dtype = compute_dtype(value)  # rotary positions leave queries and keys in float32
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # [T, heads, d]
    out: Any = varlen_attn(
        q,
        k.index_select(0, keys),
        v.index_select(0, keys),
        *bounds,
        scale=options.scale,
        # (keys before the query, keys after): a window of W tokens includes the query itself
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(0, 1)[None]
