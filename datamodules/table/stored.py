"""Tokenised pairs on disk, mapped into memory so that RAM use does not grow with their number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from app.files import file_hash
from datamodules.records import TokenisedPair
from datamodules.table.labels import as_text, kept_as_text

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


class TokenisedTable:
    """A read-only table of N tokenised pairs in a folder of `pairs.arrow` and `table.json`; see `open_table`.

    Attributes: `prompt_lengths`, `chosen_lengths`, `rejected_lengths` (0 for a demonstration), their sum
    `lengths`, and `row_lengths` of the prompt with the longer response, each [N] int64 in tokens; `prompt_keys`
    [N] int64, equal for equal prompts; `answer_keys` [N, 2] int64 of chosen and rejected response, likewise;
    `label_kinds`, the types of the values by label; `has_rejected`, whether every pair has a rejected response;
    `report`, counts of rows by outcome, and `examples`, the first few places for each kind of loss.
    """

    def __init__(self, folder: Path, table: pa.Table, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.report: dict[str, int] = meta["report"]
        self.examples: dict[str, list[str]] = meta["examples"]
        self.label_kinds: dict[str, list[str]] = meta["label_kinds"]
        self._table = table
        self._prompts, self._chosen, self._rejected = (
            _TokenColumn(table.column(name)) for name in ("prompt", "chosen", "rejected")
        )
        self.prompt_lengths, self.chosen_lengths, self.rejected_lengths = (
            column.lengths() for column in (self._prompts, self._chosen, self._rejected)
        )
        self.lengths: np.ndarray = self.prompt_lengths + self.chosen_lengths + self.rejected_lengths
        self.row_lengths: np.ndarray = self.prompt_lengths + np.maximum(self.chosen_lengths, self.rejected_lengths)
        self.prompt_keys: np.ndarray = table.column("prompt_key").to_numpy()
        self.answer_keys: np.ndarray = np.stack(
            [table.column(name).to_numpy() for name in ("chosen_key", "rejected_key")], axis=1
        )
        rejected = table.column("rejected")
        self.has_rejected: bool = bool(len(table)) and rejected.null_count == 0
        self._has_rejected: np.ndarray = rejected.is_valid().to_numpy()  # [N] bool

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> TokenisedPair:
        """Return the tokens of pair `index`. Raises IndexError if there is no such pair."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index = int(index) % len(self)
        rejected = self._rejected[index] if self._has_rejected[index] else None
        return TokenisedPair(self._prompts[index], self._chosen[index], rejected)

    def keys(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return `TokenisedPair.key` of these pairs, [n] int64."""
        return np.array([self[int(index)].key for index in indices], dtype=np.int64)

    def __reduce__(self) -> tuple[object, ...]:
        return open_table, (self.folder,)  # another process maps the same file

    @cached_property
    def largest_id(self) -> int:
        """Return the largest token id of all pairs; -1 without tokens."""
        return max(column.largest() for column in (self._prompts, self._chosen, self._rejected))

    @property
    def id_column(self) -> pa.ChunkedArray:
        """Return the ids of all pairs as a column of the mapped file."""
        return self._table.column("pair_id")

    def pair_ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return the ids of these pairs."""
        return self._take("pair_id", indices)

    def labels(self, indices: Sequence[int] | np.ndarray) -> dict[str, list[object]]:
        """Return each label's values for these pairs: None if a row lacks the label, text if types are mixed."""
        rows = [json.loads(text) for text in self._take("labels", indices)] if self.label_kinds else []
        columns = {name: [row.get(name) for row in rows] for name in self.label_kinds}
        for name, kinds in self.label_kinds.items():
            if kept_as_text(kinds):
                columns[name] = [as_text(value) for value in columns[name]]
        return columns

    def _take(self, column: str, indices: Sequence[int] | np.ndarray) -> list[Any]:
        return self._table.column(column).take(pa.array(np.asarray(indices, dtype=np.int64))).to_pylist()


class _TokenColumn:
    """A column of token ids by row, read without a copy by the offsets and values of every chunk."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._starts = np.cumsum([0, *map(len, column.chunks)])  # row where each chunk begins
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        first, end = self._offsets[chunk][row - self._starts[chunk] :][:2]
        return self._values[chunk][first:end].astype(np.int64)

    def largest(self) -> int:
        """Return the largest id of all rows; -1 without ids."""
        return max((int(values.max(initial=-1)) for values in self._values), default=-1)

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of every row, [N] int64."""
        lengths = [np.diff(offsets) for offsets in self._offsets]
        return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)


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
