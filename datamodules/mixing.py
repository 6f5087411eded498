"""Mixtures of several data sources: their settings, and how many pairs each gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.errors import UserError
from app.method.ranges import FactorFromOne, PositiveFloat, checked
from datamodules.sources import PreferredBy, RowFormat, RowReading, SourceAddress


@checked
@dataclass(frozen=True)
class WeightedSource:
    """One of several sources: an entry of the list `data.path`.

    Args:
        path: file, pattern of files, folder or Hub id.
        weight: its share of the training pairs is this over the sum of all weights; give one to all sources or
            to none (then every pair of every source is used).
        name: label `source` and id prefix of its pairs; default: the last part of `path`, and the subset.

    The other arguments are those of `PreferenceData`, for this source alone.
    """

    path: str
    weight: PositiveFloat | None = None
    name: str | None = None
    split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    subset: str | None = None
    revision: str | None = None
    format: RowFormat = "auto"
    min_score_ratio: FactorFromOne = 1.0
    preferred_by: PreferredBy = "better"
    columns: dict[str, str] | None = None

    @property
    def label(self) -> str:
        """Return `name`, or else the last part of `path` and the subset."""
        return self.name or self.path.rstrip("/").rpartition("/")[2] + (f"/{self.subset}" if self.subset else "")

    def address(self, split: str) -> SourceAddress:
        """Return the address of one of its splits."""
        return SourceAddress(self.path, split, self.subset, self.revision)

    def reading(self, need_rejected: bool = False) -> RowReading:
        """Return how to read its rows. Raises UserError for settings that contradict each other."""
        return RowReading(self.format, need_rejected, self.min_score_ratio, self.preferred_by, self.columns or {})


def told_apart(sources: Sequence[WeightedSource]) -> list[WeightedSource]:
    """Return the sources; those that share a label are named by their whole paths."""
    labels = [source.label for source in sources]
    return [replace(source, name=source.path) if labels.count(source.label) > 1 else source for source in sources]


def check_sources(sources: Sequence[WeightedSource]) -> None:
    """Raise UserError for an empty list, a repeated label, or weights for only some of the sources."""
    if not sources:
        raise UserError("data.path is an empty list: name at least one source.")
    labels = [source.label for source in sources]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"data.path has two sources called {twice[0]!r}: give each a name of its own.")
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        raise UserError("data.path: give every source a weight, or none of them.")


def drawn_rows(
    part_of_row: np.ndarray, rows: np.ndarray, weights: Sequence[float], names: Sequence[str]
) -> np.ndarray:
    """Return, sorted, the rows of the largest mixture with these weights that uses no pair twice.

    `part_of_row` [rows] is the source number of each row. The source with the fewest pairs for its weight gives all
    of them. The draw from each other source is seeded by its name alone and is nested: a larger draw contains every
    smaller one. Raises UserError when a source has so few pairs, or so small a weight, that it would give none.
    """
    shares = np.array(weights) / sum(weights)
    counts = np.bincount(part_of_row, minlength=len(weights))
    total = float((counts / shares).min())
    wanted = np.minimum(np.round(shares * total).astype(int), counts)
    if not wanted.all():
        empty = names[int(np.argmin(wanted))]
        raise UserError(
            f"data.path: with these weights the source {empty!r} gives no pair ({total:.1f} in all): change its "
            "weight, or take it out."
        )
    chosen = []
    for number, count in enumerate(wanted.tolist()):
        own = rows[part_of_row == number]
        key = list(names[number].encode())
        chosen.append(np.random.default_rng(key).permutation(own)[:count])
    return np.sort(np.concatenate(chosen))
