"""A view that joins several tables of pairs and adds labels to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.records import TokenisedPair
from datamodules.table.stored import PairTable, Rows, label_kind, make_room, taken


class Part(NamedTuple):
    """A table to be joined to others, with further labels and the prefix of its ids.

    A label is one value for all pairs, or a column with a value for each of them.
    """

    table: PairTable
    labels: Mapping[str, object]
    id_prefix: str = ""


class JoinedTables(PairTable):
    """A concatenation of tables.

    A pair has its own labels and those of its part; a data column with the name of a part's label is renamed to
    `<name>_in_data`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part.table) for part in parts)])  # [parts + 1]
        for name in ("lengths", "row_lengths", "prompt_keys", "answer_keys"):
            setattr(self, name, np.concatenate([getattr(part.table, name) for part in parts]))
        kinds: dict[str, set[str]] = {}
        for part in parts:
            for name, found in make_room(part.table.label_kinds, part.labels).items():
                kinds.setdefault(name, set()).update(found)
            for name, value in part.labels.items():
                kind = "float" if isinstance(value, pa.ChunkedArray) else label_kind(value)
                kinds.setdefault(name, set()).add(kind)
        self.label_kinds = {name: sorted(found) for name, found in kinds.items()}

    def _pair(self, index: int) -> TokenisedPair:
        number = self.part_of([index])[0]
        return self.parts[number].table[index - int(self.starts[number])]

    @property
    def largest_id(self) -> int:
        return max(part.table.largest_id for part in self.parts)

    def part_of(self, indices: Rows) -> np.ndarray:
        """Return the number of the part of each of these pairs, [n] int64."""
        return np.searchsorted(self.starts, np.asarray(indices, dtype=np.int64), side="right") - 1

    @property
    def id_column(self) -> pa.ChunkedArray:
        columns = [pc.binary_join_element_wise(part.id_prefix, part.table.id_column, "") for part in self.parts]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    def pair_ids(self, indices: Rows) -> list[str]:
        ids = [""] * len(indices)
        for part, places, rows in self._by_part(indices):
            for place, id in zip(places, part.table.pair_ids(rows), strict=True):
                ids[place] = part.id_prefix + id
        return ids

    def _labels(self, indices: Rows) -> dict[str, list[object]]:
        columns: dict[str, list[object]] = {name: [None] * len(indices) for name in self.label_kinds}
        for part, places, rows in self._by_part(indices):
            given = {
                name: taken(value, rows) if isinstance(value, pa.ChunkedArray) else [value] * len(rows)
                for name, value in part.labels.items()
            }
            for name, values in (make_room(part.table.labels(rows), part.labels) | given).items():
                for place, value in zip(places, values, strict=True):
                    columns[name][place] = value
        return columns

    def _by_part(self, indices: Rows) -> list[tuple[Part, list[int], np.ndarray]]:
        """Return each part with any of these pairs, their places among `indices`, and their rows in its table."""
        found = np.asarray(indices, dtype=np.int64)
        numbers = self.part_of(found)
        return [
            (self.parts[n], (places := np.flatnonzero(numbers == n)).tolist(), found[places] - self.starts[n])
            for n in np.unique(numbers).tolist()
        ]
