"""Several sources as one: how many pairs each of them gives."""

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
    """One source of several, an entry of the list `data.path`.

    Args:
        path: file, pattern of files, folder or Hub id.
        weight: its share of the training pairs is this over the sum of all weights; give it to all sources or to
            none, which takes every pair of every source.
        name: label `source` of its pairs, and the front of their ids; none takes the last part of
            `path`, and the subset.

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
        """`name`, or what takes its place."""
        return self.name or self.path.rstrip("/").rpartition("/")[2] + (f"/{self.subset}" if self.subset else "")

    def address(self, split: str) -> SourceAddress:
        """Where the rows of one of its splits are."""
        return SourceAddress(self.path, split, self.subset, self.revision)

    def reading(self, need_rejected: bool = False) -> RowReading:
        """How its rows are read. Raises UserError for settings that do not go together."""
        return RowReading(self.format, need_rejected, self.min_score_ratio, self.preferred_by, self.columns or {})


def told_apart(sources: Sequence[WeightedSource]) -> list[WeightedSource]:
    """Return the sources, named by their whole paths where two paths end alike."""
    labels = [source.label for source in sources]
    return [replace(source, name=source.path) if labels.count(source.label) > 1 else source for source in sources]


def check_sources(sources: Sequence[WeightedSource]) -> None:
    """Raises UserError for a list of sources that makes no mixture."""
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
    """Those of `rows` that make the largest mixture with these weights in which no pair stands twice, sorted.

    `part_of_row` [rows] is the number of the source of each row. The source that is scarcest for its weight gives
    all its pairs; the draw from the others depends on their names alone, and takes in that of a smaller number.
    Raises UserError when a source has so few pairs, or so small a weight, that it would give none.
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
