"""The view of a table of pairs that adds their rewards as two label columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.errors import UserError
from datamodules.records import TokenisedPair
from datamodules.rewards.scores import COLUMNS
from datamodules.table import PairTable
from datamodules.table.labels import make_room


class RewardedTable:
    """A `PairTable` view of `table` with the labels `chosen_reward` and `rejected_reward`.

    `rewards` has the columns `pair_id` and these two for every pair of the table, in any order. A data column with
    one of these names is renamed to `<name>_in_data`. `scored` [N] says which pairs have rewards.
    """

    def __init__(self, table: PairTable, rewards: pa.Table) -> None:
        self.table = table
        self.lengths = table.lengths
        self.row_lengths = table.row_lengths
        self.prompt_keys = table.prompt_keys
        self.answer_keys = table.answer_keys
        self.label_kinds = make_room(table.label_kinds, COLUMNS) | {name: ["float"] for name in COLUMNS}
        places = pc.index_in(table.id_column, value_set=rewards.column("pair_id").combine_chunks())
        self._places = places.to_numpy()  # [N] int, row in `rewards` of each pair
        if places.null_count:
            raise ValueError(f"{places.null_count} pairs were not scored")
        self._rewards = rewards
        self.scored: np.ndarray = pc.is_valid(rewards.column(COLUMNS[0])).to_numpy()[self._places]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> TokenisedPair:
        return self.table[index]

    def keys(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.table.keys(indices)

    @property
    def id_column(self) -> pa.ChunkedArray:
        return self.table.id_column

    @property
    def largest_id(self) -> int:
        return self.table.largest_id

    def pair_ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        return self.table.pair_ids(indices)

    def labels(self, indices: Sequence[int] | np.ndarray) -> dict[str, list[object]]:
        places = pa.array(self._places[np.asarray(indices, dtype=np.int64)])
        scored = {name: self._rewards.column(name).take(places).to_pylist() for name in COLUMNS}
        return make_room(self.table.labels(indices), COLUMNS) | scored


def rows_with_reward(tables: Sequence[PairTable], rows: np.ndarray) -> np.ndarray:
    """Return those `rows` of the concatenated tables that have rewards or need none.

    Raises UserError if none remains.
    """
    scored = [table.scored if isinstance(table, RewardedTable) else np.ones(len(table), bool) for table in tables]
    kept = rows[np.concatenate(scored)[rows]]
    if len(rows) and not len(kept):
        raise UserError(
            "data.reward_model: its chat template refuses the prompts of all pairs: take another reward model."
        )
    return kept
