"""What travels from the data to the model: a rank's share of an optimizer batch, and packed rows of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Layout = Literal["packed", "separate"]


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy `tensor` from the CPU; pinned on its way to a GPU, so that the host does not wait for a running step."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


class PairRun(NamedTuple):
    """How many tokens a pair takes in a row, as `[prompt | first response | second response]`.

    Padding is a run of one response without a prompt, which nobody reads.
    """

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass
class PackedRows:
    """One micro-batch: prompts and their responses, laid into R rows of T tokens.

    `packed`: a pair is one run of tokens `[prompt | chosen | rejected]`, several pairs to a row; position ids
    of the rejected response restart after the prompt. `separate`: every response has a row of its own,
    `[prompt | response]`. S responses in all, in the order pair 0 chosen, pair 0 rejected, pair 1 chosen, …;
    N response tokens in all.
    """

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64, counted within the pair
    group: Tensor  # [R, T] int64, which run of tokens (pair) a token belongs to; −1 is padding
    part: Tensor  # [R, T] int64, 0 prompt, 1 first response, 2 second response
    predict_index: Tensor  # [N] int64, index into the R·T flattened outputs that predicts the target
    target_ids: Tensor  # [N] int64, the response tokens, EOS included
    response_index: Tensor  # [N] int64 in [0, S), the response that the target belongs to
    response_tokens: Tensor  # [S] int64, number of tokens of each response
    pairs: Tensor  # [P] int64, the rows' pairs as indices into the rank's share
    runs: Sequence[
        PairRun
    ]  # of the flattened rows, padding included; on the host, so that reading them waits for no GPU
    layout: Layout = "packed"
    _remembered: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def empty(cls) -> PackedRows:
        """One token and no response: what a rank runs when the other ranks have one micro-batch more."""
        one = torch.zeros(1, 1, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int64)
        return cls(one, one, one, one, none, none, none, none, none, [PairRun(0, (1,))])

    def to(self, device: torch.device | str) -> PackedRows:
        """The same rows on `device`; nothing is remembered of them there yet."""
        columns = {each.name: getattr(self, each.name) for each in fields(self)}
        moved: dict[str, Any] = {
            name: on_device(column, device) for name, column in columns.items() if isinstance(column, Tensor)
        }
        return replace(self, **moved, _remembered={})

    def remember(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` makes of these rows, made on the first call: a mask serves many layers and two models."""
        if name not in self._remembered:
            self._remembered[name] = make()
        return self._remembered[name]


class OptimizerBatch(Protocol):
    """This rank's share (B pairs) of one optimizer batch (G pairs), as the DataModules yield it."""

    pair_ids: Sequence[str]  # [G], the global batch in its canonical order, equal on every rank
    positions: Tensor  # [B] int64, where this rank's pairs stand in the global batch
    labels: Mapping[str, Sequence[object]]  # each [G], label columns that the data carries (`flipped`, …)
    tokens: int  # of the whole global batch, every prompt counted once

    @property
    def pair_keys(self) -> Tensor:
        """Names [B] int64 of this rank's pairs by their tokens: equal for equal pairs."""
        ...

    def micro_batches(
        self,
        responses: Sequence[str],
        layout: Layout,
        balanced_row: float,
        pairs: Sequence[int] | None = None,
    ) -> list[PackedRows]:
        """Pack `pairs` (indices into the share; all when None) under the token budget of the DataModule.

        `responses` names the sides to pack: ("chosen", "rejected") or ("chosen",). `balanced_row` is the row
        length at which attention costs a token as much as the rest of the model. Empty when there is no pair.
        """
        ...

    def stretched(self) -> OptimizerBatch:
        """Two pairs made of the share's tokens: one as long as any that this run may meet, and a short one.

        What depends on places in a row, or on the longest row of a micro-batch, shows on them. No pair where the
        share has none.
        """
        ...
