"""The records of the data pipeline: a preference pair as text, and as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np


class Message(dict[str, Any]):
    """One turn of a dialogue, in the form that chat templates take.

    `role` and `content` are text; `content` may be empty if there are tool calls. Other fields of the data keep
    their names: `tool_calls`, `reasoning_content`, `name`, `tool_call_id`, ….
    """

    def __init__(self, role: str, content: str, **more: Any) -> None:
        super().__init__(role=role, content=content, **more)

    @property
    def role(self) -> str:
        return str(self["role"])

    @property
    def content(self) -> str:
        return str(self["content"])


Prompt = str | tuple[Message, ...]  # plain text, or a dialogue to which the assistant answers next
Side = Literal["chosen", "rejected"]


def read_prompt(value: Any) -> Prompt:
    """Return a prompt from its JSON: text, or messages as objects (in older files lists of role and content).

    Raises KeyError, TypeError or ValueError for anything else.
    """
    if isinstance(value, str):
        return value
    return tuple(Message(**turn) if isinstance(turn, dict) else Message(*turn) for turn in value)


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and its two responses, as text.

    `rejected` is None for a demonstration (supervised fine-tuning). `labels` holds the other scalar columns of the
    data. `rejected_ends` is False for a sampled response that was cut off by its length limit. `chosen_fields` and
    `rejected_fields` hold the fields of the answers' messages besides their text (`tool_calls`,
    `reasoning_content`); `tools` and `template_kwargs` are the row's own inputs to the chat template.
    """

    pair_id: str
    prompt: Prompt
    chosen: str
    rejected: str | None
    labels: dict[str, object] = field(default_factory=dict)
    rejected_ends: bool = True
    chosen_fields: Mapping[str, Any] = field(default_factory=dict)
    rejected_fields: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, side: Side) -> Message:
        """Return the response of one side as the assistant's message."""
        return Message("assistant", getattr(self, side), **getattr(self, f"{side}_fields"))


class Dropped(Exception):
    """The error for a pair that cannot be rendered or tokenised whole; its text is the counted reason."""


class TokenisedPair(NamedTuple):
    """The token ids of a pair; each array is one-dimensional int64 and holds at least one token."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray | None  # None for a demonstration

    @property
    def key(self) -> int:
        """Return a signed 64-bit hash of the tokens; equal tokens have equal keys, whatever data they come from."""
        digest = hashlib.blake2b(digest_size=8)
        for part in self:
            ids = np.zeros(0, np.int64) if part is None else part
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids).data)
        return int.from_bytes(digest.digest(), "little", signed=True)
