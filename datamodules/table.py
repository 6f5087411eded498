"""The table of tokenised pairs, mapped into memory to spare RAM; tables are joined and labelled without a copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.records import TokenisedPair
from datamodules.sources.rows import RowReport

Rows = Sequence[int] | np.ndarray
_TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("labels", pa.string()),  # a JSON object: columns differ from row to row and may mix types
        ("pair_key", pa.int64()),  # of the tokens: `TokenisedPair.key`
        ("prompt_key", pa.int64()),  # equal for equal prompts
        ("near_key", pa.int64()),  # equal also for prompts that differ in case, spaces or punctuation alone
        ("chosen_key", pa.int64()),  # equal for equal texts
        ("rejected_key", pa.int64()),
        ("prompt", _TOKENS),
        ("chosen", _TOKENS),
        ("rejected", _TOKENS),  # null for a demonstration
    ]
)


class Part(NamedTuple):
    """The pairs of one source in a table, and what became of the source's other rows."""

    pairs: int
    report: RowReport
    source: str = ""  # in a mixture
    unscored: int = 0  # pairs without rewards


class PairTable:
    """A read-only table of N tokenised pairs.

    `columns` has those of `SCHEMA`; every further column is a label, and a label of the data with its name becomes
    `<name>_in_data`. `kinds`: the types of the values of each label of the data. `parts`: the sources of the pairs,
    in their order.
    """

    def __init__(self, columns: pa.Table, kinds: Mapping[str, Sequence[str]], parts: Sequence[Part]) -> None:
        self.columns = columns
        self.kinds = kinds
        self.parts = parts
        self._sides = [columns.column(side) for side in TokenisedPair._fields]

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, index: int) -> TokenisedPair:
        """Return the tokens of pair `index`. Raises IndexError if there is no such pair."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        sides = (side[index].values for side in self._sides)
        arrays = (None if ids is None else ids.to_numpy().astype(np.int64) for ids in sides)
        return TokenisedPair(*arrays)  # type: ignore[arg-type]  # `rejected` alone may be None

    @cached_property
    def side_lengths(self) -> np.ndarray:
        """Return the tokens of prompt, chosen and rejected (0 for a demonstration), [3, N] int64."""
        lengths = [pc.fill_null(pc.list_value_length(side), 0) for side in self._sides]
        return np.stack([column.to_numpy().astype(np.int64) for column in lengths])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each pair, its prompt once, [N] int64."""
        return self.side_lengths.sum(axis=0)

    @cached_property
    def largest_id(self) -> int:
        return max(pc.max(chunk.values).as_py() or 0 for side in self._sides for chunk in side.chunks)

    def keys(self, name: str, indices: Rows | slice = slice(None)) -> np.ndarray:
        """Return the column `<name>_key` of these pairs, [n] int64."""
        return self.columns.column(f"{name}_key").to_numpy()[indices]

    def part_of(self, indices: Rows) -> np.ndarray:
        """Return the number of the part of each of these pairs, [n] int64."""
        return np.searchsorted(np.cumsum([part.pairs for part in self.parts]), indices, side="right")

    def reachable(self, rows: np.ndarray) -> np.ndarray:
        """Return all rows that a loader over `rows` may serve: more than these in a gap mixture."""
        return rows

    def content(self, rows: np.ndarray) -> str:
        """Return a hash of the tokens of all pairs that a loader over `rows` may serve, in their order."""
        return hashlib.blake2b(self.keys("pair", self.reachable(rows)).tobytes(), digest_size=16).hexdigest()

    def longest(self, rows: np.ndarray) -> tuple[int, int]:
        """Return the tokens of the longest reachable pair, and of the longest prompt with one response."""
        prompt, *responses = self.side_lengths[:, self.reachable(rows)]
        pairs, halves = prompt + sum(responses), prompt + np.maximum(*responses)
        return int(pairs.max(initial=0)), int(halves.max(initial=0))

    def taken(self, column: str, indices: Rows) -> list[Any]:
        return self.columns.column(column).take(pa.array(np.asarray(indices, dtype=np.int64))).to_pylist()

    def pair_ids(self, indices: Rows) -> list[str]:
        return self.taken("pair_id", indices)

    @property
    def label_names(self) -> list[str]:
        """Return the names of all labels, those of the data first."""
        added = self.columns.column_names[len(SCHEMA) :]
        return [*(f"{name}_in_data" if name in added else name for name in self.kinds), *added]

    def labels(self, indices: Rows) -> dict[str, list[object]]:
        """Return each label's values for these pairs: None if a row lacks the label, text if types are mixed."""
        rows = [json.loads(text) for text in self.taken("labels", indices)] if self.kinds else []
        columns: list[list[object]] = []
        for name, kinds in self.kinds.items():
            values = [row.get(name) for row in rows]
            present = set(kinds) - {"NoneType"}  # do they fit one Arrow column without rounding?
            if present == {"int", "float"}:
                values = [None if value is None else float(value) for value in values]
            elif not (present <= {"int", "wide integer"} or (len(present) == 1 and "big integer" not in present)):
                values = [None if value is None else str(value) for value in values]
            columns.append(values)
        columns += [self.taken(name, indices) for name in self.columns.column_names[len(SCHEMA) :]]
        return dict(zip(self.label_names, columns, strict=True))

    def with_labels(self, **labels: pa.Array | pa.ChunkedArray) -> PairTable:
        """Return the table with further labels, each with a value [N] for every pair."""
        columns = self.columns
        for name, values in labels.items():
            columns = columns.append_column(name, values)
        return PairTable(columns, self.kinds, self.parts)

    def named(self, source: str) -> PairTable:
        """Return the table as one source of a mixture: the label `source` names it, and so do the pairs' ids."""
        ids = pc.binary_join_element_wise(f"{source}/", self.columns.column("pair_id"), "")
        columns = self.columns.set_column(0, "pair_id", ids).append_column("source", pa.repeat(source, len(self)))
        return PairTable(columns, self.kinds, [part._replace(source=source) for part in self.parts])


def joined(tables: Sequence[PairTable]) -> PairTable:
    """Return the pairs of several tables with the same columns as one table."""
    kinds: dict[str, list[str]] = {}
    for table in tables:
        for name, found in table.kinds.items():
            kinds[name] = sorted({*kinds.get(name, ()), *found})
    parts = [part for table in tables for part in table.parts]
    return PairTable(pa.concat_tables([table.columns for table in tables]), kinds, parts)


def label_kind(value: object) -> str:
    """Return the name of a value's type; an integer beyond 53 bits is "wide", one beyond 64 bits "big"."""
    if isinstance(value, int) and abs(value) > 2**53:
        return "wide integer" if -(2**63) <= value < 2**63 else "big integer"
    return type(value).__name__
