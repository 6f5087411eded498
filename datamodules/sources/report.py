"""Errors of single rows, and the report that counts them."""

from __future__ import annotations

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
    """The counts of one pass over a source; at its end, `rows` = `pairs` + the sum of `skipped`."""

    rows: int = 0
    pairs: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # rows skipped, by reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first few locations, by reason
    ignored_fields: Counter[str] = field(default_factory=Counter)  # rows by field that cannot be a label

    def skip(self, reason: str, location: str) -> None:
        """Count a row that was left out, and keep its location if it is one of the first."""
        self.skipped[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES_PER_REASON:
            places.append(location)

    def summary(self) -> str:
        """Return one readable line: how many rows became pairs, and why the others did not."""
        text = f"{self.rows} rows read, {self.pairs} pairs"
        for reason, count in self.skipped.most_common():
            text += f"; {count} skipped: {reason} ({', '.join(self.examples[reason])}{', …' * (count > 3)})"
        if self.ignored_fields:
            text += f"; not scalar, so no label: {', '.join(sorted(self.ignored_fields))}"
        return text
