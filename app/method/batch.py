"""The records that go from the data to the model: a rank's share of an optimizer batch, and its packed rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Layout = Literal["packed", "separate"]


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy `tensor` from the CPU to `device`, through pinned memory for a GPU so that the host need not wait."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


class PairRun(NamedTuple):
    """The token counts of one pair in a row, `[prompt | first | second response]`; padding is one response."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass
class Memory:
    """A record that remembers values derived from it: one mask serves many layers and two models."""

    _remembered: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def remember(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, computed once per `name`."""
        if name not in self._remembered:
            self._remembered[name] = make()
        return self._remembered[name]


class Piece(NamedTuple):
    """Queries next to each other in a row: a prompt with its first response, or another response."""

    start: int
    tokens: int
    prompt: int  # where the prompt begins
    shared: int  # tokens of the prompt that are keys as well, if it is in another piece


@dataclass
class PairRuns(Memory):
    """The ordered runs of one row, with what all layers, policy and reference derive from them."""

    runs: Sequence[PairRun]

    @cached_property
    def pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        end = 0
        for prompt, responses in self.runs:
            begin = end
            for number, response in enumerate(responses):
                tokens, shared = (response, prompt) if number else (prompt + response, 0)
                pieces.append(Piece(end, tokens, begin, shared))
                end += tokens
        return pieces


@dataclass
class PackedRows(Memory):
    """One micro-batch: prompts and their responses in R rows of T tokens.

    In the layout `packed` a row holds several pairs, each a run of tokens `[prompt | chosen | rejected]`; the
    positions of the rejected response restart after the prompt. In the layout `separate` every response has a row
    of its own, `[prompt | response]`. The S responses, with N tokens in all, are those of pair 0, pair 1, …
    """

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64, counted within the pair
    group: Tensor  # [R, T] int64, which run of tokens (pair) a token belongs to; −1 is padding
    part: Tensor  # [R, T] int64, 0 prompt, 1 first response, 2 second response
    predict_index: Tensor  # [N] int64, index into the R·T flattened outputs: the output that predicts the target
    target_ids: Tensor  # [N] int64, the response tokens, end-of-turn included
    response_index: Tensor  # [N] int64 in [0, S), the response that the target belongs to
    response_tokens: Tensor  # [S] int64, number of tokens of each response
    pairs: Tensor  # [P] int64, the rows' pairs as indices into the rank's share
    # of the flattened rows, padding included; on the host, so that reading them does not wait for a GPU
    runs: Sequence[PairRun]
    layout: Layout = "packed"

    @classmethod
    def empty(cls) -> PackedRows:
        """Return one token and no response, which a rank runs when other ranks have more micro-batches."""
        one = torch.zeros(1, 1, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int64)
        return cls(one, one, one, one, none, none, none, none, none, [PairRun(0, (1,))])

    def to(self, device: torch.device | str) -> PackedRows:
        """Return the same rows on `device`, with an empty memory."""
        columns = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: on_device(column, device) for name, column in columns.items()}
        return replace(self, **moved, _remembered={})


class OptimizerBatch(Protocol):
    """This rank's share (B pairs) of one optimizer batch (G pairs), which the DataModules yield."""

    pair_ids: Sequence[str]  # [G], the global batch in its canonical order, equal on every rank
    positions: Tensor  # [B] int64, indices of this rank's pairs in the global batch
    labels: Mapping[str, Sequence[object]]  # each [G], label columns of the data (`flipped`, …)
    tokens: int  # of the whole global batch, every prompt counted once

    @property
    def pair_keys(self) -> Tensor:
        """Return hashes [B] int64 of the tokens of this rank's pairs."""
        ...

    def micro_batches(
        self, responses: Sequence[str], layout: Layout, balanced_row: float, pairs: Sequence[int] | None = None
    ) -> list[PackedRows]:
        """Pack the sides `responses` of `pairs` (indices into the share; None: all) under the DataModule's budget.

        `balanced_row` is the row length at which attention costs as much per token as the rest of the model.
        """
        ...

    def stretched(self, pairs: Sequence[int]) -> OptimizerBatch:
        """Return a pair as long as any of this run and a short one, made of the tokens of `pairs`, or of the share.

        They expose what depends on positions in a row or on the longest row; a share without pairs gives none.
        """
        ...
