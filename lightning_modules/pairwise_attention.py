"""Attention pair by pair, the default on CPUs, and what this project's attentions share: runs and registration.

With a dense mask the cost of attention is quadratic in the row. Pair by pair it is the sum of the costs of the
pairs, so all pairs of a micro-batch can be in one row without padding. It needs no compiler and no special kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from app.method.batch import Memory, PairRun

PAIRWISE = "pairwise"  # its name in transformers


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


# (query [1, heads, T, d], key and value [1, key heads, T, d], runs, options) → [1, heads, T, d]
Attend = Callable[[Tensor, Tensor, Tensor, PairRuns, Options], Tensor]


def register(name: str, attend: Attend, softcaps: bool = False) -> None:
    """Register `attend`, which knows a soft cap if `softcaps`, with transformers as the implementation `name`."""

    @torch.compiler.disable  # compiled layers call it uncompiled; FlexAttention is compiled separately
    def implementation(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        pair_runs: PairRuns | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Return the output [1, T, heads, d] and no weights, as transformers calls an attention (see `Attend`).

        Raises ValueError for unsupported options, so that the start-up check tries another attention.
        """
        if pair_runs is None:
            raise ValueError("this model does not hand the layout of the rows to its attention")
        for unknown, given in (others | {"softcap": None if softcaps else softcap}).items():
            if unknown in ("s_aux", "position_bias", "softcap") and given is not None:
                raise ValueError(f"attention {name} has no {unknown}")
        out = attend(query, key, value, pair_runs, Options(sliding_window, scaling, softcap))
        return out.transpose(1, 2), None

    AttentionInterface.register(name, implementation)


def one_dtype(*states: Tensor) -> list[Tensor]:
    """Return the states in the autocast dtype, or without autocast in the dtype of the last state.

    Rotary positions leave queries and keys in float32.
    """
    device = states[-1].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[-1].dtype
    return [each.to(dtype) for each in states]


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


def attend(query: Tensor, key: Tensor, value: Tensor, runs: PairRuns, options: Options) -> Tensor:
    """Compute attention pair by pair; see `Attend`."""
    # split, because the gradient of a slice is as large as the whole tensor
    sizes = [piece.tokens for piece in runs.pieces]
    split = (states.split(sizes, dim=2) for states in (query, key, value))
    outputs: list[Tensor] = []
    whole: list[Tensor] = []  # keys and values of the piece that holds the prompt
    for piece, q, *own in zip(runs.pieces, *split, strict=True):
        if piece.shared:
            own = [
                torch.cat([first[:, :, : piece.shared], rest], 2) for first, rest in zip(whole, own, strict=True)
            ]
        else:
            whole = own
        k, v = own
        mask = piece_mask(runs, q.shape[2], k.shape[2], options.window, q)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, 2)


register(PAIRWISE, attend)
