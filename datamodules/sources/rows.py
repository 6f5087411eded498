"""Checks and conversions of the values of a row, the errors of single rows, and the report that counts them."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field

_EXAMPLES_PER_REASON = 3


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

    def note(self, reason: str, place: str) -> None:
        """Count a row by a reason, and keep its place if it is one of the first."""
        self.counts[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES_PER_REASON:
            places.append(place)

    def extend(self, later: RowReport) -> None:
        """Add what became of later rows."""
        self.counts.update(later.counts)
        for reason, places in later.examples.items():
            known = self.examples.setdefault(reason, [])
            known += places[: _EXAMPLES_PER_REASON - len(known)]

    @property
    def complete(self) -> bool:
        """Return whether every row became a pair."""
        return self.counts["pairs"] == self.counts["rows"]

    def lines(self) -> list[str]:
        """Return a text for each reason: how often, and where first."""
        told = []
        for reason, count in self.counts.most_common():
            if reason not in ("rows", "pairs"):
                places = self.examples.get(reason)
                told.append(f"{count} {reason}" + (f" (first: {', '.join(places)})" if places else ""))
        return told

    def summary(self) -> str:
        """Return one readable line: how many rows became pairs, and why the others did not."""
        return "; ".join([f"{self.counts['rows']} rows read, {self.counts['pairs']} pairs", *self.lines()])


_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_CONSTANTS: dict[str, object] = {"true": True, "false": False}


class Cell(str):
    """The text of a cell in an untyped file (.csv, .tsv); as a label or a choice it may be a number."""


def typed(value: object) -> object:
    """Return a cell as a number or truth value if it spells one, else as text; return other values unchanged."""
    if not isinstance(value, Cell):
        return value
    if _NUMBER.fullmatch(value):
        return float(value) if set(value) & set(".eE") else int(value)
    return _CONSTANTS.get(value.lower(), str(value))


def decoded(value: str) -> object:
    """Return the value of a text in JSON or in Python's syntax. Raises ValueError."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(str(error)) from error


def missing(value: object) -> bool:
    """Return whether a value is missing: null, or NaN, which means null in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def kind(value: object) -> str:
    """Return the name of a value's type, for a message."""
    return "null" if value is None else "text" if isinstance(value, str) else type(value).__name__


def text(value: object, name: str) -> str:
    """Return `value`, which must be valid text. `name` is its field. Raises BadRow."""
    if missing(value):  # null, or an empty cell: the same reason as of blank text
        raise BadRow(f"empty {name}", "no value")
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer accepts
        raise BadRow("text is not valid Unicode", name) from None
    return str(value)
