"""The interface of a table of pairs that loaders use, and a view that joins several tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.records import TokenisedPair
from datamodules.table.labels import as_text, kept_as_text, label_kind, make_room


class PairTable(Protocol):
    """A table of N tokenised pairs: a `TokenisedTable`, or a view of tables that copies nothing."""

    lengths: np.ndarray  # [N] int64, tokens of a pair, its prompt once
    row_lengths: np.ndarray  # [N] int64, tokens of its prompt and its longer response
    prompt_keys: np.ndarray  # [N] int64, equal for equal prompts
    answer_keys: np.ndarray  # [N, 2] int64 of chosen and rejected, equal for equal texts
    label_kinds: dict[str, list[str]]  # types of the values, by label

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TokenisedPair: ...

    def keys(self, indices: Sequence[int] | np.ndarray) -> np.ndarray: ...

    @property
    def id_column(self) -> pa.ChunkedArray: ...

    @property
    def largest_id(self) -> int: ...

    def pair_ids(self, indices: Sequence[int] | np.ndarray) -> list[str]: ...

    def labels(self, indices: Sequence[int] | np.ndarray) -> dict[str, list[object]]: ...


def find(table: PairTable, pair_ids: Sequence[str]) -> list[int]:
    """Return the rows of the pairs with these ids. Raises KeyError for an id that is not in the table."""
    found = pc.index_in(pa.array(pair_ids, pa.string()), value_set=table.id_column).to_pylist()
    if None in found:
        raise KeyError(pair_ids[found.index(None)])
    return found


class Part(NamedTuple):
    """A table to be joined to others, with the labels for all its pairs and the prefix of their ids."""

    table: PairTable
    labels: Mapping[str, object]
    id_prefix: str = ""


class JoinedTables:
    """A concatenation of tables, as a `PairTable`.

    A pair has its own labels and those of its part; a data column with the name of a part's label is renamed to
    `<name>_in_data`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part.table) for part in parts)])  # [parts + 1]
        self.lengths: np.ndarray = np.concatenate([part.table.lengths for part in parts])
        self.row_lengths: np.ndarray = np.concatenate([part.table.row_lengths for part in parts])
        self.prompt_keys: np.ndarray = np.concatenate([part.table.prompt_keys for part in parts])
        self.answer_keys: np.ndarray = np.concatenate([part.table.answer_keys for part in parts])
        kinds: dict[str, set[str]] = {}
        for part in parts:
            for name, found in make_room(part.table.label_kinds, part.labels).items():
                kinds.setdefault(name, set()).update(found)
            for name, value in part.labels.items():
                kinds.setdefault(name, set()).add(label_kind(value))
        self.label_kinds: dict[str, list[str]] = {name: sorted(found) for name, found in kinds.items()}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> TokenisedPair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index = int(index) % len(self)
        number = self.part_of(np.array([index]))[0]
        return self.parts[number].table[index - int(self.starts[number])]

    @property
    def largest_id(self) -> int:
        return max(part.table.largest_id for part in self.parts)

    def keys(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.array([self[int(index)].key for index in indices], dtype=np.int64)

    def part_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the number of the part of each of these pairs, [n] int64."""
        return np.searchsorted(self.starts, np.asarray(indices, dtype=np.int64), side="right") - 1

    @property
    def id_column(self) -> pa.ChunkedArray:
        columns = [pc.binary_join_element_wise(part.id_prefix, part.table.id_column, "") for part in self.parts]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    def pair_ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        ids = [""] * len(indices)
        for part, places, rows in self._by_part(indices):
            for place, id in zip(places, part.table.pair_ids(rows), strict=True):
                ids[place] = part.id_prefix + id
        return ids

    def labels(self, indices: Sequence[int] | np.ndarray) -> dict[str, list[object]]:
        columns: dict[str, list[object]] = {name: [None] * len(indices) for name in self.label_kinds}
        for part, places, rows in self._by_part(indices):
            own = make_room(part.table.labels(rows), part.labels)
            given = {name: [value] * len(rows) for name, value in part.labels.items()}
            for name, values in (own | given).items():
                for place, value in zip(places, values, strict=True):
                    columns[name][place] = value
        for name, kinds in self.label_kinds.items():
            if kept_as_text(kinds):
                columns[name] = [as_text(value) for value in columns[name]]
        return columns

    def _by_part(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Part, list[int], np.ndarray]]:
        """Return each part with any of these pairs, their places among `indices`, and their rows in its table."""
        found = np.asarray(indices, dtype=np.int64)
        numbers = self.part_of(found)
        return [
            (self.parts[n], (places := np.flatnonzero(numbers == n)).tolist(), found[places] - self.starts[n])
            for n in np.unique(numbers).tolist()
        ]
