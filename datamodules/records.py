"""The records that pass through the data pipeline: a preference pair as text, and as token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Message(NamedTuple):
    """One turn of a dialogue; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]  # plain text, or a dialogue that ends with a user's turn


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and its two responses, as text.

    `rejected` is None for a demonstration (supervised fine-tuning). `labels` holds the scalar columns that the
    data carries besides. `rejected_ends` is False for a sampled response that ran into its length limit, and so has
    no end.
    """

    pair_id: str
    prompt: Prompt
    chosen: str
    rejected: str | None
    labels: dict[str, object] = field(default_factory=dict)
    rejected_ends: bool = True


class TokenisedPair(NamedTuple):
    """Token ids of a pair; each array is one-dimensional int64 and holds at least one token."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray | None  # None for a demonstration

    @property
    def key(self) -> int:
        """A signed 64-bit hash of the tokens: equal pairs have equal keys, whatever data they come from."""
        digest = hashlib.blake2b(digest_size=8)
        for part in self:
            ids = np.zeros(0, np.int64) if part is None else part
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids).data)
        return int.from_bytes(digest.digest(), "little", signed=True)
