"""The records of the data pipeline: a pair as text and as token ids, and the checks and counts of its row."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from unicodedata import category

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
    """Return a prompt from its JSON: text, or messages as objects (in older files lists of role and content)."""
    if isinstance(value, str):
        return value
    return tuple(Message(**turn) if isinstance(turn, dict) else Message(*turn) for turn in value)


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and its two responses, as text.

    `labels` are the other scalar columns of the data, `chosen_fields` and `rejected_fields` the fields of the
    answers' messages besides their text (`tool_calls`, `reasoning_content`), `tools` and `template_kwargs` the own
    inputs of the row to the chat template.
    """

    pair_id: str
    prompt: Prompt
    chosen: str
    rejected: str | None  # None for a demonstration (supervised fine-tuning)
    labels: dict[str, object] = field(default_factory=dict)
    rejected_ends: bool = True  # False for a sample that was cut off by its length limit
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


class BadRow(Exception):
    """The error for a row that is not a pair. `reason` is a short phrase that is counted, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class LeftOut(BadRow):
    """The error for a valid row that the settings leave out: it is counted and never stops the run."""


@dataclass
class RowReport:
    """The counts of one pass over a source: "rows", "pairs", and by reason what happened to rows.

    At its end, "rows" is "pairs" and all reasons that begin with "skipped" or "dropped".
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first few places, by reason
    kinds: dict[str, list[str]] = field(default_factory=dict)  # the types of each label's values

    def note(self, reason: str, place: str) -> None:
        """Count a row by a reason, and keep its place if it is one of the first."""
        self.extend(RowReport(Counter([reason]), {reason: [place]}))

    def extend(self, later: RowReport) -> None:
        """Add what became of later rows."""
        self.counts.update(later.counts)
        for reason, places in later.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *places][:3]
        for name, kinds in later.kinds.items():
            self.kinds[name] = sorted({*self.kinds.get(name, ()), *kinds})

    @property
    def complete(self) -> bool:
        """Return whether every row became a pair."""
        return self.counts["pairs"] == self.counts["rows"]

    def lines(self) -> list[str]:
        """Return a text for each reason: how often, and where first."""
        places = {reason: f" (first: {', '.join(first)})" for reason, first in self.examples.items()}
        counted = [found for found in self.counts.most_common() if found[0] not in ("rows", "pairs")]
        return [f"{count} {reason}{places.get(reason, '')}" for reason, count in counted]

    def summary(self) -> str:
        """Return one readable line: how many rows became pairs, and why the others did not."""
        return "; ".join([f"{self.counts['rows']} rows read, {self.counts['pairs']} pairs", *self.lines()])


_NUMBER = re.compile(r"-?(0|[1-9]\d{0,999})(\.\d+)?([eE][+-]?\d+)?|true|false", re.ASCII | re.IGNORECASE)


class Cell(str):
    """The text of a cell in an untyped file (.csv, .tsv); as a label or a choice it may be a number."""


def typed(value: object) -> object:
    """Return a cell as a number or truth value if it spells one, else as text; return other values unchanged."""
    if not isinstance(value, Cell):
        return value
    return json.loads(value.lower()) if _NUMBER.fullmatch(value) else str(value)


def decoded(value: str, name: str) -> object:
    """Return the value of a text in JSON or in Python's syntax. `name` is its field. Raises BadRow."""
    try:
        with suppress(ValueError, RecursionError):
            return json.loads(value)
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise BadRow("bad JSON", name) from error


def missing(value: object) -> bool:
    """Return whether a value is missing: null, or NaN, which means null in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def blank(text: str) -> bool:
    """Return whether a text shows nothing: it holds spaces, control and format characters (U+200B, …) alone."""
    return all(sign.isspace() or category(sign) in ("Cc", "Cf") for sign in text)


def has_value(row: Mapping[str, object], *names: str) -> bool:
    """Return whether the row has a value in any of these fields."""
    return any(not missing(row.get(name)) for name in names)


def kind(value: object) -> str:
    """Return the name of a value's type, for a message."""
    return "null" if value is None else "text" if isinstance(value, str) else type(value).__name__


def wrong_type(value: object, name: str, wanted: str) -> BadRow:
    """Return the error for a field `name` whose value is not `wanted`."""
    return BadRow("wrong type", f"{name} is {kind(value)}, not {wanted}")


def text(value: object, name: str) -> str:
    """Return `value`, which must be valid text. `name` is its field. Raises BadRow."""
    if missing(value):  # null, or an empty cell: the same reason as of blank text
        raise BadRow(f"empty {name}", "no value")
    if not isinstance(value, str):
        raise wrong_type(value, name, "text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer accepts
        raise BadRow("text is not valid Unicode", name) from None
    return str(value)
