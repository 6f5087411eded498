"""Attention pair by pair, the default on CPUs, and what this project's attentions share: runs and registration.

With a dense mask the cost of attention is quadratic in the row. Pair by pair it is the sum of the costs of the
pairs, so all pairs of a micro-batch can be in one row without padding. It needs no compiler and no special kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from app.method.batch import PairRun

PAIRWISE = "pairwise"  # its name in transformers


@dataclass(frozen=True)
class PairRuns:
    """The ordered runs of one row, with a store for derived values that all layers, policy and reference share."""

    runs: Sequence[PairRun]
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def made(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value of `make()`, which is called only the first time for a `name`."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


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
        """Compute attention through `attend`, with the signature that transformers calls.

        `query` is [1, heads, T, d], `key` and `value` are [1, key heads, T, d]; returns [1, T, heads, d] and no
        weights. Raises ValueError for unsupported options, so that the start-up check tries another attention.
        """
        if pair_runs is None:
            raise ValueError("this model does not hand the layout of the rows to its attention")
        others |= {} if softcaps else {"softcap": softcap}
        for unknown in ("s_aux", "position_bias", "softcap"):
            if others.get(unknown) is not None:
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

    return runs.made((PAIRWISE, queries, keys, window, like.dtype), make)


def attend(query: Tensor, key: Tensor, value: Tensor, runs: PairRuns, options: Options) -> Tensor:
    """Compute attention pair by pair; see `Attend`."""
    # a piece is the prompt with the first response, or one of the other responses
    sizes = [size for prompt, (first, *rest) in runs.runs for size in (prompt + first, *rest)]
    # split, because the gradient of a slice is as large as the whole tensor
    queries, keys, values = (states.split(sizes, dim=2) for states in (query, key, value))
    outputs: list[Tensor] = []
    for prompt, responses in runs.runs:
        whole = len(outputs)
        for number in range(len(responses)):
            q, k, v = (pieces[len(outputs)] for pieces in (queries, keys, values))
            if number:
                k, v = (torch.cat([p[whole][:, :, :prompt], own], 2) for p, own in ((keys, k), (values, v)))
            mask = piece_mask(runs, q.shape[2], k.shape[2], options.window, q)
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=mask is None, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
    return torch.cat(outputs, 2)


register(PAIRWISE, attend)
