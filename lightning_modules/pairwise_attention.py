"""Attention pair by pair: what a row of pairs costs on a CPU when nobody computes what the mask would hide.

A dense mask makes attention cost the square of the row; here it costs what the pairs cost by themselves, so that
all pairs of a micro-batch can lie in one row without any padding. Registered with transformers as an attention
implementation of its own; a FlexAttention block mask does the same on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from app.method.batch import PackedRows

PAIRWISE = "pairwise"  # the name under which transformers knows it


@dataclass
class PairRuns:
    """The runs of a micro-batch, in the order in which they lie in its flattened rows.

    Each is (tokens of the prompt, tokens of each response); padding is a run of a response without prompt, which
    costs little and is read by nobody.
    """

    runs: list[tuple[int, list[int]]]
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: PackedRows) -> PairRuns:
        """Read off the rows' groups and parts, without a loop over tokens."""
        row = torch.arange(len(rows.group), device=rows.group.device)[:, None].expand_as(rows.group)
        keys = torch.stack([row.flatten(), rows.group.flatten(), rows.part.flatten()], 1)
        segments, lengths = torch.unique_consecutive(keys, dim=0, return_counts=True)
        runs: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for (in_row, group, part), length in zip(segments.tolist(), lengths.tolist(), strict=True):
            prompt, responses = runs.setdefault((in_row, group), ([], []))
            (prompt if part == 0 and group >= 0 else responses).append(length)
        return cls([(sum(prompt), responses) for prompt, responses in runs.values()])

    @property
    def split_sizes(self) -> list[int]:
        """Tokens of every piece: the prompt with the first response, then each other response."""
        return [size for prompt, responses in self.runs for size in (prompt + sum(responses[:1]), *responses[1:])]

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """Which of `keys` the last `queries` of them see, [queries, keys] additive; None where causal order does.

        Made once and shared by all layers and by policy and reference.
        """
        window = None if window is None or keys <= window else window
        if queries == keys and window is None:
            return None
        if (mask := self._masks.get((queries, keys, window))) is None or mask.dtype != like.dtype:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(queries, keys, dtype=like.dtype).masked_fill_(hidden, -torch.inf).to(like.device)
            self._masks[queries, keys, window] = mask
        return mask


@torch.compiler.disable  # a loop over the pairs of this batch: nothing to compile once for all
def pairwise_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pair_runs: PairRuns | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention in which every response sees its own prompt and itself, as transformers calls it.

    `query` [R, heads, T, d], `key` and `value` [R, key heads, T, d]; returns [R, T, heads, d] and no weights.
    Raises ValueError for what it cannot do, which sends the start-up check to the model's own attention.
    """
    if pair_runs is None:
        raise ValueError("this model does not hand the layout of the rows to its attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"pair by pair, attention has no {name}")

    def pieces(states: Tensor) -> list[Tensor]:
        # [1, heads, tokens, d] each; split, not sliced: a slice's gradient is as large as the whole
        flat = states.transpose(0, 1).flatten(1, 2)[None]
        return list(flat.split(pair_runs.split_sizes, dim=2))

    queries, keys, values = pieces(query), pieces(key), pieces(value)
    outputs: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> None:
        mask = pair_runs.mask(q.shape[2], k.shape[2], sliding_window, q)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2))

    piece = 0
    for prompt, responses in pair_runs.runs:
        attend(queries[piece], keys[piece], values[piece])
        for other in range(piece + 1, piece + max(len(responses), 1)):
            seen = [torch.cat([whole[piece][:, :, :prompt], whole[other]], 2) for whole in (keys, values)]
            attend(queries[other], *seen)
        piece += max(len(responses), 1)
    height, width = query.shape[0], query.shape[2]
    return torch.cat(outputs, 1).view(height, width, query.shape[1], -1), None


AttentionInterface.register(PAIRWISE, pairwise_attention)
