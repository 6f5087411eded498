"""Selection and order of the training pairs by a score: a column of the data, or of the file of `predict`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.core.errors import UserError, first_line
from app.method.dynamic_beta import number_kept
from app.method.ranges import PositiveShare, checked
from datamodules.table import PairTable


@checked
@dataclass(frozen=True)
class Ranking:
    """The order of the training pairs by a score (`data.order`), in every epoch; ties keep the order of the data.

    Args:
        by: column with the score: of the data, or of `scores`, such as `gap`; `random` draws by pair id, alike in
            every run, as a control.
        minus: column that is subtracted from it; none subtracts nothing.
        scores: file that `beta-dpo predict` wrote for this data, joined by pair id; none takes the data's labels.
        first: whether the pairs with the `largest` or the `smallest` scores come first.
    """

    by: str
    minus: str | None = None
    scores: str | None = None
    first: Literal["largest", "smallest"] = "largest"

    option: ClassVar[str] = "order"

    def apply(self, table: PairTable, rows: np.ndarray) -> tuple[np.ndarray, str]:
        """Return the training pairs `rows` in this order, and a line for the log."""
        rows, note = self.first_of(table, rows, len(rows))
        return rows, f"{note}, first to last, in every epoch"

    def first_of(self, table: PairTable, rows: np.ndarray, count: int) -> tuple[np.ndarray, str]:
        """Return the first `count` of `rows` by the score, and which those are. UserError unless all are finite."""
        scores = self._column(self.by, table, rows)
        if self.minus is not None:
            scores = scores - self._column(self.minus, table, rows)
        order = np.argsort(-scores if self.first == "largest" else scores, kind="stable")[:count]
        name = self.by + (f" − {self.minus}" if self.minus else "") + (f" of {self.scores}" if self.scores else "")
        ends = f"{scores[order[0]]:.4g} to {scores[order[-1]]:.4g}"
        return rows[order], f"{self.option}: {count} of {len(rows)} pairs by {self.first} {name} ({ends})"

    def _column(self, name: str, table: PairTable, rows: np.ndarray) -> np.ndarray:
        """Return a column [n] float64 of the pairs `rows` [n]."""
        values: list[Any]
        if self.scores is not None:
            values = self._of_file(self.scores, name, table, rows)
        elif name in table.label_names:
            values = [value for (value,) in table.values(rows, name)]
        elif name == "random":
            digests = (hashlib.blake2b(id.encode(), digest_size=6).digest() for id in table.pair_ids(rows))
            values = [int.from_bytes(digest) / 2**48 for digest in digests]
        else:
            carried = ", ".join(table.label_names) or "none"
            raise UserError(
                f"data.{self.option}: the data has no column {name!r}; it has these: {carried}. Name one of them, "
                f"or give the file of `beta-dpo predict` as data.{self.option}.scores."
            )
        bad = [n for n, value in enumerate(values) if not isinstance(value, int | float) or not np.isfinite(value)]
        if bad:
            raise UserError(
                f"data.{self.option}: {len(bad)} of {len(rows)} training pairs have no finite number in the column "
                f"{name!r} (first: {table.pair_ids(rows[bad[:1]])[0]} with {values[bad[0]]!r:.40}): complete the "
                "column, or take these pairs out."
            )
        return np.array(values, dtype=np.float64)

    def _of_file(self, path: str, name: str, table: PairTable, rows: np.ndarray) -> list[Any]:
        option = f"data.{self.option}.scores"
        try:
            found = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{option}: {path} cannot be read ({first_line(error)}): `beta-dpo predict` writes it."
            ) from error
        if missing := {"pair_id", name} - set(found.column_names):
            has = ", ".join(found.column_names)
            raise UserError(f"{option}: {path} has no column {missing.pop()!r}; it has {has}.")
        ids = found["pair_id"].combine_chunks()
        if len(ids.unique()) < len(ids):
            raise UserError(f"{option}: {path} names a pair twice: give the scores of one `predict`.")
        wanted = table.pair_ids(rows)
        places = pc.index_in(pa.array(wanted, ids.type), value_set=ids).to_pylist()
        if None in places:
            raise UserError(
                f"{option}: {path} lacks {places.count(None)} of {len(rows)} training pairs (first: "
                f"{wanted[places.index(None)]}): run `beta-dpo predict` on this data."
            )
        return found[name].take(places).to_pylist()


@checked
@dataclass(frozen=True)
class Selection(Ranking):
    """The training pairs with the first scores (`data.select`); the others are left out and counted.

    Args:
        share: share of the training pairs to keep; at least one pair is kept.
    """

    option: ClassVar[str] = "select"
    share: PositiveShare = 0.5

    def apply(self, table: PairTable, rows: np.ndarray) -> tuple[np.ndarray, str]:
        """Return the selected of the training pairs `rows`, in their order, and a line for the log."""
        chosen, note = self.first_of(table, rows, number_kept(len(rows), self.share))
        return rows[np.isin(rows, chosen)], f"{note}; {len(rows) - len(chosen)} left out"
