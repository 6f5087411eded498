"""What our own attentions share: the runs of a micro-batch, and how transformers calls an attention of ours."""

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
    """The runs of one row, in their order. What attentions make of them serves all layers, policy and reference."""

    runs: Sequence[PairRun]
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def made(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made on the first call."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


# (query, key, value, runs, window, scale, softcap) → output, states [1, heads, T, d]
Attend = Callable[[Tensor, Tensor, Tensor, PairRuns, int | None, float | None, float | None], Tensor]


def register(name: str, attend: Attend) -> Callable[..., tuple[Tensor, None]]:
    """Make `attend` known to transformers as the attention implementation `name`; returns what is registered."""

    @torch.compiler.disable  # compiled layers call it as it is; FlexAttention is compiled by itself
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
        """Attention in which every response sees its own prompt and itself, as transformers calls it.

        `query` [1, heads, T, d], `key` and `value` [1, key heads, T, d]; returns [1, T, heads, d] and no weights.
        Raises ValueError for what it cannot do, which sends the start-up check to another attention.
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
    """The states in the type of autocast, or as the last: rotary positions leave queries and keys in float32."""
    device = states[-1].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[-1].dtype
    return [each.to(dtype) for each in states]
