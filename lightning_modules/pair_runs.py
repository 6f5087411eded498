"""The parts that this project's attentions share: the runs of a row, and registration with transformers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from app.method.batch import PairRun


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


# (query, key, value, runs, window, scale, softcap) → output; all states are [1, heads, T, d]
Attend = Callable[[Tensor, Tensor, Tensor, PairRuns, int | None, float | None, float | None], Tensor]


def register(name: str, attend: Attend) -> Callable[..., tuple[Tensor, None]]:
    """Register `attend` with transformers as the attention implementation `name`, and return the implementation."""

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
        for unknown in ("s_aux", "position_bias"):
            if others.get(unknown) is not None:
                raise ValueError(f"attention {name} has no {unknown}")
        out = attend(query, key, value, pair_runs, sliding_window, scaling, softcap)
        return out.transpose(1, 2), None

    AttentionInterface.register(name, implementation)
    return implementation


def one_dtype(*states: Tensor) -> list[Tensor]:
    """Return the states in the autocast dtype, or without autocast in the dtype of the last state.

    Rotary positions leave queries and keys in float32.
    """
    device = states[-1].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[-1].dtype
    return [each.to(dtype) for each in states]
