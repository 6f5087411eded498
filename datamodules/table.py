"""Tables of tokenised pairs: on disk, mapped into memory to spare RAM, and views that join them and add labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.core.files import file_hash
from datamodules.records import TokenisedPair

T = TypeVar("T")
Rows = Sequence[int] | np.ndarray
TABLE_VERSION = 5  # raise if a change of reading, tokenising or the layout below changes the content of tables
_TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("labels", pa.string()),  # a JSON object: columns differ from row to row and may mix types
        ("prompt_key", pa.int64()),
        ("chosen_key", pa.int64()),
        ("rejected_key", pa.int64()),
        ("prompt", _TOKENS),
        ("chosen", _TOKENS),
        ("rejected", _TOKENS),  # null for a demonstration
    ]
)


class DamagedTable(Exception):
    """A table folder whose content is incomplete or altered."""


class PairTable:
    """A table of N tokenised pairs: a `TokenisedTable`, or `JoinedTables`, which copy nothing."""

    lengths: np.ndarray  # [N] int64, tokens of a pair, its prompt once
    row_lengths: np.ndarray  # [N] int64, tokens of its prompt and its longer response
    prompt_keys: np.ndarray  # [N] int64, equal for equal prompts
    answer_keys: np.ndarray  # [N, 2] int64 of chosen and rejected, equal for equal texts
    label_kinds: dict[str, list[str]]  # types of the values, by label
    id_column: pa.ChunkedArray  # [N] pair ids

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenisedPair:
        """Return the tokens of pair `index`. Raises IndexError if there is no such pair."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return self._pair(int(index) % len(self))

    def keys(self, indices: Rows) -> np.ndarray:
        """Return `TokenisedPair.key` of these pairs, [n] int64."""
        return np.array([self[int(index)].key for index in indices], dtype=np.int64)

    def pair_ids(self, indices: Rows) -> list[str]:
        """Return the ids of these pairs."""
        return taken(self.id_column, indices)

    def labels(self, indices: Rows) -> dict[str, list[object]]:
        """Return each label's values for these pairs: None if a row lacks the label, text if types are mixed."""
        columns = self._labels(indices)
        for name, kinds in self.label_kinds.items():
            present = set(kinds) - {"NoneType"}  # do they fit one Arrow column?
            if not (present <= {"int", "float"} or (len(present) == 1 and "big integer" not in present)):
                columns[name] = [None if value is None else str(value) for value in columns[name]]
        return columns

    def reachable(self, rows: np.ndarray) -> np.ndarray:
        """Return all rows that a loader over `rows` may serve: more than these in a gap mixture."""
        return rows

    @property
    def largest_id(self) -> int:
        """Return the largest token id of all pairs; -1 without tokens."""
        raise NotImplementedError

    def _pair(self, index: int) -> TokenisedPair:
        raise NotImplementedError

    def _labels(self, indices: Rows) -> dict[str, list[object]]:
        raise NotImplementedError


def taken(column: pa.ChunkedArray, indices: Rows) -> list[Any]:
    """Return the values of a column in these rows."""
    return column.take(pa.array(np.asarray(indices, dtype=np.int64))).to_pylist()


def find(table: PairTable, pair_ids: Sequence[str]) -> list[int]:
    """Return the rows of the pairs with these ids. Raises KeyError for an id that is not in the table."""
    found = pc.index_in(pa.array(pair_ids, pa.string()), value_set=table.id_column).to_pylist()
    if None in found:
        raise KeyError(pair_ids[found.index(None)])
    return found


def label_kind(value: object) -> str:
    """Return the name of a value's type; an integer beyond 64 bits is a "big integer"."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "big integer"
    return type(value).__name__


def make_room(labels: Mapping[str, T], added: Iterable[str]) -> dict[str, T]:
    """Return `labels` with every name that is also in `added` changed to `<name>_in_data`."""
    names = set(added)
    return {f"{name}_in_data" if name in names else name: values for name, values in labels.items()}


class TokenisedTable(PairTable):
    """A read-only table of N tokenised pairs in a folder of `pairs.arrow` and `table.json`; see `open_table`.

    Attributes: `chosen_lengths` and `rejected_lengths` (0 for a demonstration), each [N] int64 in tokens; `report`,
    counts of rows by outcome, and `examples`, the first few places for each kind of loss.
    """

    def __init__(self, folder: Path, table: pa.Table, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.report: dict[str, int] = meta["report"]
        self.examples: dict[str, list[str]] = meta["examples"]
        self.label_kinds = meta["label_kinds"]
        self.id_column = table.column("pair_id")
        self._label_column = table.column("labels")
        self._prompts, self._chosen, self._rejected = (
            _TokenColumn(table.column(name)) for name in ("prompt", "chosen", "rejected")
        )
        self.chosen_lengths, self.rejected_lengths = self._chosen.lengths, self._rejected.lengths
        self.lengths = self._prompts.lengths + self.chosen_lengths + self.rejected_lengths
        self.row_lengths = self._prompts.lengths + np.maximum(self.chosen_lengths, self.rejected_lengths)
        self.prompt_keys = table.column("prompt_key").to_numpy()
        keys = [table.column(name).to_numpy() for name in ("chosen_key", "rejected_key")]
        self.answer_keys = np.stack(keys, axis=1)
        self._has_rejected: np.ndarray = table.column("rejected").is_valid().to_numpy()  # [N] bool

    def _pair(self, index: int) -> TokenisedPair:
        rejected = self._rejected[index] if self._has_rejected[index] else None
        return TokenisedPair(self._prompts[index], self._chosen[index], rejected)

    @cached_property
    def largest_id(self) -> int:
        return max(column.largest() for column in (self._prompts, self._chosen, self._rejected))

    def _labels(self, indices: Rows) -> dict[str, list[object]]:
        rows = [json.loads(text) for text in taken(self._label_column, indices)] if self.label_kinds else []
        return {name: [row.get(name) for row in rows] for name in self.label_kinds}


class _TokenColumn:
    """A column of token ids by row, read without a copy by the offsets and values of every chunk."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._starts = np.cumsum([0, *map(len, column.chunks)])  # row where each chunk begins
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]
        lengths = [np.diff(offsets) for offsets in self._offsets]
        self.lengths = np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)  # [N]

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        first, end = self._offsets[chunk][row - self._starts[chunk] :][:2]
        return self._values[chunk][first:end].astype(np.int64)

    def largest(self) -> int:
        """Return the largest id of all rows; -1 without ids."""
        return max((int(values.max(initial=-1)) for values in self._values), default=-1)


def open_table(folder: Path) -> TokenisedTable:
    """Return the table in `folder`, mapped into memory. Raises DamagedTable if it is incomplete or altered."""
    try:
        meta = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        if meta["version"] != TABLE_VERSION:
            raise DamagedTable(f"{folder} has version {meta['version']}, not {TABLE_VERSION}")
        if meta["checksum"] != file_hash(folder / "pairs.arrow"):
            raise DamagedTable(f"{folder}/pairs.arrow does not match its checksum")
        table = pa.ipc.open_file(pa.memory_map(str(folder / "pairs.arrow"))).read_all()
        if table.schema != SCHEMA:
            raise DamagedTable(f"{folder}/pairs.arrow has other columns")
        table.validate()
        return TokenisedTable(folder, table, meta)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DamagedTable(f"{folder} cannot be opened ({error!r})") from error


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
