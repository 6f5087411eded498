"""Checks and conversions of the values of a row, the errors of single rows, and the report that counts them."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field


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
        self.extend(RowReport(Counter([reason]), {reason: [place]}))

    def extend(self, later: RowReport) -> None:
        """Add what became of later rows."""
        self.counts.update(later.counts)
        for reason, places in later.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *places][:3]

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
